"""Starts a memcached and asks it over a unix socket, in three threads that know every answer.

memcached.py ROUNDS PACE MEMCACHED: ends after ROUNDS, or, where that is 0, once there is a file
`finish`. Whatever is not as it was set ends it with 1.
"""
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time

CELLS, KEYS, THREADS = 400, 3000, 3
rounds, pace, memcached = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
PATH = "memcached.socket"


def digest(*parts):
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def fail(what):
    os.write(2, ("WRONG: %s\n" % what).encode())
    os._exit(1)


class Client:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(PATH)
        self.file = self.socket.makefile("rb")

    def set(self, key, value):
        self.socket.sendall(b"set %s 0 0 %d\r\n%s\r\n" % (key.encode(), len(value), value))
        answer = self.file.readline()
        if answer != b"STORED\r\n":
            fail("set %s: %r" % (key, answer))

    def get(self, key):
        self.socket.sendall(b"get %s\r\n" % key.encode())
        head = self.file.readline()
        if head == b"END\r\n":
            return None
        value = self.file.read(int(head.split()[3]) + 2)[:-2]
        if self.file.readline() != b"END\r\n":
            fail("an answer without an end")
        return value

    def must_be(self, key, value):
        got = self.get(key)
        if got != value:
            fail("%s is %r, not %r" % (key, got, value))


def cell(number):
    return ("cell %06d %s" % (number, digest("cell", number))).encode()


def value(thread, key, version):
    return (digest(thread, key, version) * (1 + key % 12)).encode()


server = subprocess.Popen([memcached, "-u", "root", "-s", PATH, "-m", "32", "-t", "3"])
while True:
    try:
        first = Client()
        break
    except (ConnectionRefusedError, FileNotFoundError):
        if server.poll() is not None:
            fail("memcached does not start")
        time.sleep(0.01)
for number in range(CELLS):
    first.set("ledger-%d" % number, cell(number))
progress = open("progress", "ab", buffering=0)
done = [0] * THREADS


def work(me):
    client, versions = Client(), {}
    while True:
        n = done[me]
        key = n * 7919 % KEYS
        if key in versions:
            client.must_be("%d-%d" % (me, key), value(me, key, versions[key]))
        versions[key] = n
        client.set("%d-%d" % (me, key), value(me, key, n))
        client.must_be("%d-%d" % (me, key), value(me, key, n))
        client.must_be("ledger-%d" % (n * 7 % CELLS), cell(n * 7 % CELLS))
        done[me] = n + 1
        progress.write(b"x")
        if done[me] == rounds or (rounds == 0 and os.path.exists("finish")):
            break
        time.sleep(pace)
    for key, version in versions.items():
        client.must_be("%d-%d" % (me, key), value(me, key, version))


def run(me):
    try:
        work(me)
    except BaseException as error:
        fail("%r" % error)


threads = [threading.Thread(target=run, args=(me,)) for me in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for number in range(CELLS):
    first.must_be("ledger-%d" % number, cell(number))
if server.poll() is not None:
    fail("memcached has ended")
server.terminate()
server.wait()
with open("result", "w") as result:
    result.write("%d\n" % sum(done))
