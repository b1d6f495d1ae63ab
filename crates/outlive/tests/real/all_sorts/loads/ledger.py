"""Three threads that take turns with an SQLite database in memory, and a child asked over pipes.

ledger.py ROUNDS PACE: ends after ROUNDS, or, where that is 0, once there is a file `finish`.
"""
import hashlib
import os
import sqlite3
import subprocess
import sys
import threading
import time

CHILD = """
import hashlib, sys
last = b""
for line in sys.stdin.buffer:
    last = hashlib.sha256(last + line).hexdigest().encode()
    sys.stdout.buffer.write(last + b"\\n")
    sys.stdout.buffer.flush()
"""
CELLS, THREADS = 400, 3
rounds, pace = int(sys.argv[1]), float(sys.argv[2])


def digest(*parts):
    return hashlib.sha256("".join(map(str, parts)).encode()).hexdigest()


database = sqlite3.connect(":memory:", check_same_thread=False)
database.execute("create table ledger (cell integer primary key, text text)")
database.execute("create table work (round integer primary key, thread integer, text text)")
cells = ((cell, "cell %06d %s" % (cell, digest(cell))) for cell in range(CELLS))
database.executemany("insert into ledger values (?, ?)", cells)
database.commit()

pipe = subprocess.PIPE
child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=pipe, stdout=pipe)
progress = open("progress", "ab", buffering=0)
turn = threading.Condition()
done, ended, last = 0, False, ""


def work(me):
    global done, ended, last
    while True:
        with turn:
            turn.wait_for(lambda: ended or done % THREADS == me)
            if ended:
                return
            where = (done * 7 % CELLS,)
            text = database.execute("select text from ledger where cell = ?", where).fetchone()[0]
            child.stdin.write(("%d %s\n" % (done, text)).encode())
            child.stdin.flush()
            last = digest(last, child.stdout.readline().decode())
            database.execute("insert into work values (?, ?, ?)", (done, me, last))
            database.execute("delete from work where round < ?", (done - 2000,))
            done += 1
            progress.write(b"x")
            ended = done == rounds or (rounds == 0 and os.path.exists("finish"))
            turn.notify_all()
        time.sleep(pace)


threads = [threading.Thread(target=work, args=(me,)) for me in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
child.stdin.close()
assert child.wait() == 0
everything = hashlib.sha256()
for table in ("ledger", "work"):
    for row in database.execute("select * from %s order by 1" % table):
        everything.update(repr(row).encode())
with open("result", "w") as result:
    result.write("%d\n%s\n%s\n" % (done, last, everything.hexdigest()))
