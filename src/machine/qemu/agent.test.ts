import assert from "node:assert/strict";
import { test } from "node:test";
import { gzipSync } from "node:zlib";
import { AgentInGuest } from "../../../test/support/agent-in-guest.ts";
import { UserError } from "../../base/errors.ts";
import { GuestAgent } from "./agent.ts";

const options = { timeoutMs: 5_000, what: "a test" };

test("answers find their commands in any order, through stray bytes", async () => {
  const guest = new AgentInGuest();
  const agent = new GuestAgent(guest, () => "");
  const first = agent.run("echo 1", options);
  const second = agent.run("echo 2", options);
  guest.push("\xff\0garbage\n7 7 7\n");
  guest.answer(guest.asked[1]!.id, 3, "two ä\n");
  guest.answer(guest.asked[0]!.id, 0, "");
  assert.deepEqual(await second, { code: 3, output: "two ä\n" });
  assert.deepEqual(await first, { code: 0, output: "" });
  assert.deepEqual(
    guest.asked.map(({ script }) => script),
    ["echo 1", "echo 2"],
  );
});

test("an answer in pieces is one answer", async () => {
  const guest = new AgentInGuest();
  const result = new GuestAgent(guest, () => "").run("x", options);
  const line = `${guest.asked[0]!.id} 0 ${gzipSync("whole").toString("base64")}\n`;
  for (const byte of line) guest.push(byte);
  assert.equal((await result).output, "whole");
});

test("hello tells the kernel, even after noise on the line", async () => {
  const guest = new AgentInGuest();
  const agent = new GuestAgent(guest, () => "");
  guest.push("noisecoiommu-agent 1 6.1.0-test\n");
  assert.equal(await agent.hello(1_000), "6.1.0-test");
});

const says = (pattern: RegExp) => (error: unknown) =>
  error instanceof UserError && error.exitCode === 1 && pattern.test(error.message);

test("what hangs is named, with the console's last line", async () => {
  const agent = new GuestAgent(new AgentInGuest(), () => "Kernel panic");
  await assert.rejects(agent.hello(5), says(/user space within 0.005 s.*Kernel panic/));
  await assert.rejects(agent.run("x", { timeoutMs: 5, what: "fio" }), says(/^fio .*Kernel panic/));
});

test("the end of QEMU fails what is under way and what comes later", async () => {
  const agent = new GuestAgent(new AgentInGuest(), () => "");
  const running = agent.run("x", options);
  agent.fail("QEMU was killed by SIGKILL");
  await assert.rejects(running, says(/SIGKILL during a test/));
  await assert.rejects(agent.run("x", options), says(/SIGKILL/));
  await assert.rejects(agent.hello(1_000), says(/SIGKILL before the guest reached user space/));
});

test("a damaged answer is an error, not output", async () => {
  const guest = new AgentInGuest();
  const result = new GuestAgent(guest, () => "").run("x", options);
  guest.push(`${guest.asked[0]!.id} 0 AAAA\n`);
  await assert.rejects(result, says(/damaged/));
});

test("a mark is asked for without a script, and its number comes back", async () => {
  const guest = new AgentInGuest();
  const agent = new GuestAgent(guest, () => "");
  const marked = agent.mark(5_000);
  const refused = agent.mark(5_000);
  assert.deepEqual(guest.marks, ["1", "2"]);
  assert.deepEqual(guest.asked, []);
  guest.answer("2", 1, "");
  guest.answer("1", 0, "");
  assert.equal(await marked, 1);
  await assert.rejects(refused, /takes no marks/);
});
