import assert from "node:assert/strict";
import { test } from "node:test";
import { qemuArguments } from "./qemu.ts";

const options = { kernel: "k", initrd: "i", memoryMiB: 512, cpus: 2, accel: "tcg" } as const;

test("devices are told the numbers that their descriptors have in QEMU", () => {
  const device = (name: string) => (fds: readonly number[]) => ["-device", `${name},fd=${fds.join(":")}`];
  const words = qemuArguments(
    {
      ...options,
      devices: [
        { fds: [40, 41], arguments: device("a") },
        { fds: [], arguments: device("b") },
        { fds: [42], arguments: device("c") },
      ],
    },
    "tcg",
  );
  assert.deepEqual(words.slice(-6), ["-device", "a,fd=6:7", "-device", "b,fd=", "-device", "c,fd=8"]);
});

test("guest memory is a shared memfd, of the size asked", () => {
  const words = qemuArguments(options, "tcg");
  assert.ok(words.includes("memory-backend-memfd,id=m0,size=512M,share=on"));
  assert.ok(words.includes("q35,memory-backend=m0"));
});

test("a shell has the terminal; otherwise the console is a socket pair", () => {
  assert.ok(qemuArguments({ ...options, shell: true }, "tcg").includes("stdio,id=console,signal=off"));
  assert.ok(qemuArguments(options, "tcg").includes("socket,id=console,fd=5"));
});
