"""Runs a PostgreSQL with pgbench, in one long session and in many short ones; in the end all sums
must agree, and every transaction that was acknowledged must be there.

postgres.py PACE BINARIES: in a directory with a new cluster in `data`; ends once there is a file
`finish`. What is not as expected ends it with 1.
"""
import hashlib
import os
import signal
import subprocess
import sys
import time

CELLS, TRANSACTIONS = 400, 20
pace, binaries = float(sys.argv[1]), sys.argv[2]
here = os.getcwd()


def fail(what):
    os.write(2, ("WRONG: %s\n" % what).encode())
    # It removes its System V segment.
    server.send_signal(signal.SIGQUIT)
    server.wait()
    os._exit(1)


def command(name, *words):
    return [os.path.join(binaries, name), "-h", here, "-U", "keeper", *words]


def call(name, *words):
    done = subprocess.run(command(name, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        fail("%s: %d: %s" % (name, done.returncode, done.stderr.decode()))
    return done.stdout.decode()


def ask(query):
    return call("psql", "-X", "-q", "-A", "-t", "-d", "postgres", "-c", query).strip()


def cell(number):
    return "cell %06d %s" % (number, hashlib.sha256(str(number).encode()).hexdigest())


settings = {
    "listen_addresses": "",
    "unix_socket_directories": here,
    # More than all tables: what is looked for in memory is there.
    "shared_buffers": "64MB",
    # Files of the cluster, so that nothing is left elsewhere.
    "dynamic_shared_memory_type": "mmap",
    "max_connections": "20",
    "logging_collector": "off",
    "autovacuum_naptime": "1s",
    "bgwriter_delay": "10ms",
    "checkpoint_timeout": "30s",
}
words = [word for setting in settings.items() for word in ("-c", "%s=%s" % setting)]
log = open("log", "ab", buffering=0)
server = subprocess.Popen([os.path.join(binaries, "postgres"), "-D", "data", *words],
                          stdout=log, stderr=log)
while subprocess.call(command("pg_isready", "-q")) != 0:
    if server.poll() is not None:
        fail("postgres does not start")
    time.sleep(0.05)
call("pgbench", "-i", "-q", "-s", "1", "postgres")
ask("create table ledger (cell integer primary key, text text)")
ask("insert into ledger values " + ",".join("(%d, '%s')" % (n, cell(n)) for n in range(CELLS)))

progress = open("progress", "ab", buffering=0)
session = subprocess.Popen(
    command("pgbench", "-n", "-c", "2", "-T", "1000000", "-R", "200", "postgres"),
    stdout=log, stderr=log)
done = 0
while not os.path.exists("finish"):
    call("pgbench", "-n", "-c", "2", "-t", str(TRANSACTIONS // 2), "postgres")
    done += TRANSACTIONS
    progress.write(b"x")
    if session.poll() is not None:
        fail("the long session ended with %d" % session.returncode)
    time.sleep(pace)
session.send_signal(signal.SIGTERM)
session.wait()

sums = ask("select (select sum(abalance) from pgbench_accounts),"
           "(select sum(tbalance) from pgbench_tellers),"
           "(select sum(bbalance) from pgbench_branches),"
           "(select sum(delta) from pgbench_history)").split("|")
if len(set(sums)) != 1:
    fail("sums differ: %s" % sums)
count = int(ask("select count(*) from pgbench_history"))
if count < done:
    fail("%d transactions were acknowledged, %d are there" % (done, count))
ledger = ask("select text from ledger order by cell").splitlines()
if ledger != [cell(number) for number in range(CELLS)]:
    fail("the ledger is not what it was")
call("pg_amcheck", "--install-missing", "--heapallindexed", "-d", "postgres")
server.send_signal(signal.SIGINT)
if server.wait() != 0:
    fail("postgres ended with %d" % server.returncode)
with open("result", "w") as result:
    result.write("%d\n" % (done // TRANSACTIONS))
