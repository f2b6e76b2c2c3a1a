import assert from "node:assert/strict";
import { Duplex } from "node:stream";
import { test } from "node:test";
import { Qmp, type QmpEvent } from "./qmp.ts";

/** Greets, and answers commands as `answers` says. */
class FakeQemu extends Duplex {
  readonly #answers: Record<string, object>;

  constructor(answers: Record<string, object>) {
    super();
    this.#answers = { qmp_capabilities: { return: {} }, ...answers };
    this.say({ QMP: { version: { qemu: { major: 7, minor: 2, micro: 22 } }, capabilities: [] } });
  }
  say(message: object): void {
    this.push(`${JSON.stringify(message)}\r\n`);
  }
  override _read(): void {}
  override _write(chunk: Buffer, _: string, done: () => void): void {
    const { execute, id } = JSON.parse(chunk.toString());
    if (this.#answers[execute]) this.say({ ...this.#answers[execute], id });
    done();
  }
}

test("greeting, a command, an error", async () => {
  const refusal = { error: { class: "GenericError", desc: "Device 'x' not found" } };
  const qmp = new Qmp(new FakeQemu({ "query-status": { return: { running: false } }, device_del: refusal }));
  assert.equal(await qmp.ready, "7.2.22");
  assert.deepEqual(await qmp.execute("query-status"), { running: false });
  await assert.rejects(qmp.execute("device_del", { id: "x" }), /Device 'x' not found/);
});

test("events reach their listeners until these leave", async () => {
  const qemu = new FakeQemu({});
  const qmp = new Qmp(qemu);
  const heard: QmpEvent[] = [];
  const leave = qmp.onEvent((event) => heard.push(event));
  qemu.say({ event: "STOP", timestamp: {} });
  await qmp.ready;
  leave();
  qemu.say({ event: "RESUME", timestamp: {} });
  await new Promise(setImmediate);
  assert.deepEqual(heard, [{ event: "STOP", data: {} }]);
});

test("a lost connection fails what is asked", async () => {
  const qemu = new FakeQemu({});
  const qmp = new Qmp(qemu);
  await qmp.ready;
  const asked = qmp.execute("query-status");
  qemu.destroy();
  await assert.rejects(asked, /closed its control connection/);
  await assert.rejects(qmp.execute("query-status"), /closed its control connection/);
});
