/** A guest that wants more pinned than it may: it is slowed down, and the host gives no more. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { readCounters } from "../../src/control/guest-side.ts";
import { runFio } from "../../src/machine/qemu/fio.ts";
import { parseFioWorkload } from "../../src/machine/workload-text.ts";
import { FRONT_ENDS } from "../../src/virtio/front-end.ts";
import { bootedVm, pinnedPages } from "./support.ts";

const QUOTA = 400;
/** Frames of a request of fio's, without its header. */
const REQUEST = 16;

for (const frontEnd of FRONT_ENDS)
  test(`at its quota a guest finds room by unpinning, or waits; the quota is never passed and nothing is lost: ${frontEnd}`, async (t) => {
    // Through crosvm's function nothing of what firmware touched, its window included, is ever unpinned.
    const quota = frontEnd === "crosvm" ? 2 * QUOTA : QUOTA;
    const before = pinnedPages();
    const vm = await bootedVm(t, { frontEnd, quota });
    const { pins } = vm;
    // 32 requests of 16 frames are more than the quota.
    const workload = parseFioWorkload("fio:rw=randwrite,bs=64k,iodepth=32,size=32M,seconds=3");
    const written = await runFio(vm.qemu.agent, workload);
    const { framesPeak, framesUnpinned, framesPinned, pinRequestsRefused, kernelPagesPeak } = pins;
    const seen = { framesPeak, framesUnpinned, framesPinned, pinRequestsRefused, ops: written.ops };
    t.diagnostic(JSON.stringify(seen));
    assert.deepEqual([written.verified, written.errors, vm.disk.faults], [true, 0, 0]);
    assert.ok(framesPeak <= quota && kernelPagesPeak - before <= quota, "the host never gives more");
    assert.ok(framesPeak > quota - 2 * REQUEST, "it comes as near to its quota as a request");
    assert.ok(framesPinned > quota && framesUnpinned > 0, "it wanted more, and got it by and by");
    const { pin_refused, underflow } = await readCounters(vm.qemu.agent);
    // A quick disk has done so much by then that room is found each time.
    assert.equal(pin_refused! > 0, pinRequestsRefused > 0, "its driver was told");
    assert.equal(underflow, 0);
  });
