"""Changes an SQLite database and a file of notes in place and appends to a log, and checks in every
round that all three are what it remembers.

writer.py JOURNAL-MODE: ends once there is a file `enough`. What is not as expected ends it with 1 and
is in the file `wrong`.
"""
import os, random, sqlite3, sys, time


def must(holds, what):
    if not holds:
        with open("wrong", "w") as wrong:
            wrong.write(what)
        os._exit(1)


database = sqlite3.connect("data", isolation_level=None)
database.execute("pragma synchronous=off")
mode = database.execute("pragma journal_mode=" + sys.argv[1]).fetchone()[0]
must(mode == sys.argv[1], "it has no journal mode " + sys.argv[1])
database.execute("create table t (id integer primary key, value integer, text blob)")
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
notes = os.open("notes", os.O_RDWR | os.O_CREAT, 0o600)
remembered, length, round = {}, 0, 0
while not os.path.exists("enough"):
    round += 1
    database.execute("begin immediate")
    for _ in range(4):
        key = random.randrange(100)
        text = random.randbytes(random.randrange(3000))
        database.execute("insert or replace into t values (?, ?, ?)", (key, round, text))
        remembered[key] = (round, text)
    database.execute("commit")
    found = {row[0]: row[1:] for row in database.execute("select id, value, text from t")}
    must(found == remembered, "round %d: the database is of another time" % round)
    length += os.write(log, b"round %d\n" % round)
    must(os.fstat(log).st_size == length, "round %d: the log is of another time" % round)
    os.pwrite(notes, b"%09d" % round, round % 7 * 20000)
    for back in range(min(round, 7)):
        said = int(os.pread(notes, 9, (round - back) % 7 * 20000))
        must(said == round - back, "round %d: the notes are of another time" % round)
    time.sleep(0.001)
must(database.execute("pragma integrity_check").fetchall() == [("ok",)], "it is damaged")
database.close()
