"""Starts an nginx with two workers and asks it over a unix socket, in three threads that know every
answer; in the end the server must have counted each question once.

nginx.py PACE NGINX: ends once there is a file `finish`. What is not as expected ends it with 1.
"""
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

CELLS, LEDGERS, PAGES, THREADS = 40, 6, 8, 3
pace, nginx = float(sys.argv[1]), sys.argv[2]
PATH = "nginx.socket"
asked, lock = 0, threading.Lock()
progress = open("progress", "ab", buffering=0)


def fail(what):
    os.write(2, ("WRONG: %s\n" % what).encode())
    os._exit(1)


def digest(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


class Client:
    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(PATH)
        self.file = self.socket.makefile("rb")

    def get(self, path):
        global asked
        self.socket.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        status, length = self.file.readline(), None
        while True:
            line = self.file.readline()
            if line in (b"\r\n", b""):
                break
            name, value = line.split(b":", 1)
            if name.lower() == b"content-length":
                length = int(value)
        if status != b"HTTP/1.1 200 OK\r\n":
            fail("%s: %r" % (path, status))
        with lock:
            asked += 1
        return self.file.read(length)


ledger = " ".join("cell %06d %s" % (100 + n, digest(n)) for n in range(CELLS))
with open("nginx.conf") as template:
    text = template.read()
locations = ['location = /ledger-%d { return 200 "%s"; }\n' % (n, ledger) for n in range(LEDGERS)]
with open("used.conf", "w") as config:
    config.write(text.replace("@LEDGERS@", "".join(locations)))
expected = {"/ledger-%d" % n: ledger.encode() for n in range(LEDGERS)}
os.mkdir("pages")
for n in range(PAGES):
    expected["/%d" % n] = (digest(n) * 50 * (n + 1)).encode()
    with open("pages/%d" % n, "wb") as page:
        page.write(expected["/%d" % n])

words = [nginx, "-e", "errors.log", "-p", os.getcwd(), "-c", "used.conf"]
server = subprocess.Popen(words)
while True:
    try:
        Client()
        break
    except (ConnectionRefusedError, FileNotFoundError):
        if server.poll() is not None:
            fail("nginx does not start")
        time.sleep(0.01)


def work(me):
    n, client = 0, Client()
    while not os.path.exists("finish"):
        path = "/ledger-%d" % (n // 3 % LEDGERS) if n % 3 == 0 else "/%d" % ((n + me) % PAGES)
        if client.get(path) != expected[path]:
            fail("%s is not what it was" % path)
        n += 1
        if n % 10 == 0:
            client = Client()
        progress.write(b"x")
        time.sleep(pace)


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
last = Client()
for path in expected:
    if last.get(path) != expected[path]:
        fail("%s is not what it was" % path)
status = last.get("/status").split()
# Active connections: A / server accepts handled requests / AC HANDLED REQUESTS / …
if int(status[9]) != asked:
    fail("%d questions, of which the server counts %s" % (asked, status[9]))
if server.poll() is not None:
    fail("nginx has ended")
server.send_signal(signal.SIGQUIT)
if server.wait() != 0:
    fail("nginx ended with %d" % server.returncode)
with open("result", "w") as result:
    result.write("%d\n" % (asked - len(expected) - 1))
