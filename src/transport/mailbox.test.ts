import assert from "node:assert/strict";
import test from "node:test";
import { Worker } from "node:worker_threads";
import { Bell } from "../memory/bell.ts";
import type { PciFunction } from "../virtio/device.ts";
import { MailboxFunction, MailboxServer, mailboxBuffer } from "./mailbox.ts";

/** Remembers what is written, and reads it back; what was never written reads as its own address. */
class Registers implements PciFunction {
  readonly log: string[] = [];
  readonly #bar = new Map<number, bigint>();
  configRead(offset: number, size: number): number {
    return size === 4 ? 0xffff_fffe : offset;
  }
  configWrite(offset: number, size: number, value: number): void {
    this.log.push(`config ${offset} ${size} ${value}`);
  }
  barRead(address: number, _size: number): bigint {
    return this.#bar.get(address) ?? BigInt(address);
  }
  barWrite(address: number, size: number, value: bigint): void {
    this.log.push(`bar ${address} ${size} ${value}`);
    this.#bar.set(address, value);
  }
  reset(): void {
    this.log.push("reset");
  }
}

interface Shared {
  readonly buffer: SharedArrayBuffer;
  readonly bell: SharedArrayBuffer;
}
const shared = (clients: number): Shared => ({ buffer: mailboxBuffer(clients), bell: Bell.buffer() });

/** A client in a thread of its own. `body` has it as `f`, and returns what it found. */
function client(
  { buffer, bell }: Shared,
  index: number,
  body: string,
  answerLimitMs = 10_000,
): Promise<unknown> {
  const source = `
    import { workerData, parentPort } from "node:worker_threads";
    import { Bell } from ${JSON.stringify(import.meta.resolve("../memory/bell.ts"))};
    import { MailboxFunction } from ${JSON.stringify(import.meta.resolve("./mailbox.ts"))};
    const bell = new Bell(workerData.bell);
    const f = new MailboxFunction({ ...workerData, ring: () => bell.ring() });
    parentPort.postMessage((() => { ${body} })());`;
  const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(source)}`), {
    workerData: { buffer, bell, client: index, answerLimitMs },
  });
  return new Promise((resolve, reject) => {
    worker.once("message", resolve);
    worker.once("error", reject);
  });
}

/** Serve until all of `clients` are done. The main thread may not sleep on a bell, so it yields instead. */
async function serve(server: MailboxServer, clients: readonly Promise<unknown>[]): Promise<unknown[]> {
  let done = false;
  const all = Promise.all(clients).finally(() => {
    done = true;
  });
  while (!done) {
    server.serve();
    await new Promise((resolve) => setImmediate(resolve));
  }
  return all;
}

test("every kind of access arrives as it was made, and its answer goes back", async () => {
  const s = shared(1);
  const registers = new Registers();
  const found = await serve(new MailboxServer(s.buffer, registers), [
    client(
      s,
      0,
      `f.configWrite(4, 2, 6);
       f.barWrite(0xfe000010, 8, 0x8000000000000001n);
       f.barWrite(2 ** 45, 1, 255n);
       const read = [f.configRead(0, 4), f.configRead(9, 1), f.barRead(0xfe000010, 8), f.barRead(2 ** 45, 1), f.barRead(77, 4)];
       f.reset();
       return read;`,
    ),
  ]);
  assert.deepEqual(found, [[0xffff_fffe, 9, 0x8000_0000_0000_0001n, 255n, 77n]]);
  assert.deepEqual(registers.log, [
    "config 4 2 6",
    "bar 4261412880 8 9223372036854775809",
    "bar 35184372088832 1 255",
    "reset",
  ]);
});

test("accesses of several CPUs at once: each gets the answer to its own", async () => {
  const s = shared(3);
  const own = (base: number) => `
    let wrong = 0;
    for (let i = 0; i < 2000; i++) {
      f.barWrite(${base} + i % 50, 4, BigInt(i));
      if (f.barRead(${base} + i % 50, 4) !== BigInt(i)) wrong++;
    }
    return wrong;`;
  const clients = [0, 1, 2].map((i) => client(s, i, own(1000 * (i + 1))));
  assert.deepEqual(await serve(new MailboxServer(s.buffer, new Registers()), clients), [0, 0, 0]);
});

test("broken twin: CPUs that share one slot get each other's answers", async () => {
  const s = shared(1);
  const body = (base: number) => `
    let wrong = 0;
    for (let i = 0; i < 20000 && !wrong; i++) if (f.barRead(${base}, 8) !== ${base}n) wrong++;
    return wrong;`;
  const clients = [1, 2, 3].map((i) => client(s, 0, body(i), 200));
  const wrong = (await serve(new MailboxServer(s.buffer, new Registers()), clients)) as number[];
  assert.ok(wrong.some((n) => n > 0));
});

test("a server that does not answer is dead: ones are read, writes are dropped, and nobody waits again", async () => {
  const s = shared(2);
  const started = performance.now();
  const found = await client(
    s,
    0,
    "f.barWrite(16, 4, 1n); const at = performance.now(); const read = [f.barRead(16, 8), f.barRead(16, 2), f.configRead(0, 1)]; return [...read, performance.now() - at < 50];",
    100,
  );
  assert.deepEqual(found, [0xffff_ffff_ffff_ffffn, 0xffffn, 0xff, true]);
  assert.ok(performance.now() - started >= 100);
  const other = await client(s, 1, "return f.configRead(0, 2);", 60_000);
  assert.equal(other, 0xffff, "it is dead for the other CPU too");

  // It comes back too late: what was given up must not happen.
  const registers = new Registers();
  new MailboxServer(s.buffer, registers).serve();
  assert.deepEqual(registers.log, []);
});

test("the client rings for each access", () => {
  let rings = 0;
  const s = shared(1);
  const server = new MailboxServer(s.buffer, new Registers());
  const ring = () => {
    rings++;
    server.serve();
  };
  const f = new MailboxFunction({ buffer: s.buffer, client: 0, ring });
  assert.deepEqual([f.barRead(5, 1), rings], [5n, 1]);
});
