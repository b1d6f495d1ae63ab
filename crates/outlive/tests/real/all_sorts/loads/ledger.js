// Timers, promises and two worker threads that share memory with the main thread.
// ledger.js ROUNDS PACE: ends after ROUNDS, or, where that is 0, once there is a file `finish`.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('node:worker_threads');
const { createHash } = require('node:crypto');
const fs = require('node:fs');
const CELLS = 400, WIDTH = 64, WORKERS = 2;

const digest = (...parts) => createHash('sha256').update(parts.join('')).digest('hex');

if (!isMainThread) {
  const ledger = Buffer.from(workerData.ledger);
  const counts = new Int32Array(workerData.counts);
  let last = '';
  parentPort.on('message', (round) => {
    if (round < 0) return parentPort.close();
    const at = ((round * 7 + workerData.me) % CELLS) * WIDTH;
    // Work that is worth compiling, and garbage that is worth collecting.
    const words = [];
    for (let i = 0; i < 200; i++) words.push({ i, text: ledger.toString('latin1', at, at + WIDTH) });
    last = digest(last, round, ...words.filter((word) => word.i % 50 === 0).map((word) => word.text));
    Atomics.add(counts, workerData.me, 1);
    parentPort.postMessage(last);
  });
} else {
  const rounds = Number(process.argv[2]), pace = Number(process.argv[3]);
  const ledger = Buffer.from(new SharedArrayBuffer(CELLS * WIDTH));
  const counts = new Int32Array(new SharedArrayBuffer(4 * WORKERS));
  for (let cell = 0; cell < CELLS; cell++) {
    const text = 'cell ' + String(cell).padStart(6, '0') + ' ' + digest(cell);
    ledger.write(text.slice(0, WIDTH), cell * WIDTH, 'latin1');
  }
  const workers = [];
  for (let me = 0; me < WORKERS; me++) {
    const shared = { me, ledger: ledger.buffer, counts: counts.buffer };
    // An error that nobody listens for ends the program.
    workers.push(new Worker(__filename, { workerData: shared }));
  }
  const ask = (worker, round) => new Promise((resolve) => {
    worker.once('message', resolve);
    worker.postMessage(round);
  });
  const progress = fs.openSync('progress', 'a');
  let done = 0, last = '', ticks = 0;
  const clock = setInterval(() => { ticks++; }, 5);
  const step = async () => {
    const answers = await Promise.all(workers.map((worker) => ask(worker, done)));
    last = digest(last, ...answers);
    done++;
    fs.writeSync(progress, 'x');
    if (rounds > 0 ? done < rounds : !fs.existsSync('finish')) return setTimeout(step, pace);
    clearInterval(clock);
    if (ticks === 0 || counts.some((count) => count !== done)) process.exit(1);
    workers.forEach((worker) => worker.postMessage(-1));
    fs.writeFileSync('result', [done, last, digest(ledger.toString('latin1'))].join('\n') + '\n');
  };
  setTimeout(step, 1);
}
