/** The build of examples/workloads: its data survive, and it finds out when they do not. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { bootedVm } from "./support.ts";

const SCRIPT = readFileSync(new URL("../../examples/workloads/build.sh", import.meta.url), "utf8");
/** Less to build, and no rest. */
const QUICK = SCRIPT.replace("sources=16", "sources=1").replaceAll(/sleep [\d.]+/g, ":");

test("a build on a tracked disk loses nothing, and needs little of the memory pinned", async (t) => {
  const vm = await bootedVm(t);
  const build = (script: string) => vm.qemu.agent.run(script, { timeoutMs: 300_000, what: "the build" });
  const { code, output } = await build(SCRIPT);
  assert.match(output, /^built: [0-9a-f]{64}$/m);
  assert.equal(code, 0, output);
  t.diagnostic(`${vm.pins.framesPinned} frames pinned, at most ${vm.pins.framesPeak}`);
  assert.deepEqual([vm.disk.faults, vm.disk.errors], [0, 0]);
  assert.ok(vm.pins.pinRequests > 500, "most of what it reads and writes is pinned on request");
  assert.ok(vm.pins.framesPeak < 131_072 / 8, "an eighth of the guest's frames");

  for (const [what, file] of [
    ["sources", "m05/s01.c"],
    ["program", "m05.a"],
  ] as const)
    await t.test(`a byte that changes in ${file} is found`, async () => {
      // Before the link: an object that is archived, or a source that is compiled.
      const flip = `printf x | dd of=$tree/${file} bs=1 seek=40 conv=notrunc 2>/dev/null`;
      const broken = QUICK.replace("\nlink\n", `\n${flip}\nlink\n`);
      assert.notEqual(broken, QUICK);
      const { code, output } = await build(broken);
      assert.match(output, new RegExp(`^${what}: [0-9a-f]{64} .* is not [0-9a-f]{64}`, "m"));
      assert.equal(code, 1);
      await build("umount /mnt");
    });
});
