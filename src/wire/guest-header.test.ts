import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import * as dtt from "./dtt.ts";
import { guestHeader } from "./guest-header.ts";
import * as viommu from "./virtio-iommu.ts";

test("the checked-in guest header is the generated one", () => {
  const checkedIn = readFileSync(new URL("../../guest/linux/coiommu_abi.h", import.meta.url), "utf8");
  assert.equal(checkedIn, guestHeader(), "run `npx node tools/generate-guest-header.ts`");
});

test("no constant of the table or the extension is missing in the guest header", () => {
  const text = guestHeader();
  const missing = Object.entries({ ...dtt, ...viommu })
    .filter(([, value]) => typeof value === "number")
    .filter(([name]) => !new RegExp(`(\\b|_)${name}\\b`).test(text))
    .map(([name]) => name);
  assert.deepEqual(missing, []);
});

test("the guest header has the appended configuration at the offsets of the layout", () => {
  const text = guestHeader();
  const f = viommu.Config.fields;
  for (const [name, at] of [
    ["ASSIGNED_BITMAP", f.assignedBitmap.at],
    ["DTT_ROOT", f.dttRoot.at],
    ["DTT_LEVELS", f.dttLevels.at],
    ["PIN_CONTROL", f.pinControl.at],
    ["PIN_STATUS", f.pinStatus.at],
    ["PIN_FLAGS", f.pinFlags.at],
    ["PIN_BATCH_MAX", f.pinBatchMax.at],
    ["PIN_QUOTA", f.pinQuota.at],
  ])
    assert.match(text, new RegExp(`#define VIRTIO_IOMMU_CONFIG_${name}\\t+${at}\\n`));
});
