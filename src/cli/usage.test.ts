import assert from "node:assert/strict";
import { test } from "node:test";
import { CommanderError } from "commander";
import { UserError } from "../base/errors.ts";
import { program } from "./program.ts";
import { quotaFrames } from "./units.ts";

/** What the program says about `args`, which it must refuse as wrong usage. */
async function refusal(...args: string[]): Promise<string> {
  let said = "";
  const root = program();
  for (const command of [root, ...root.commands])
    command.configureOutput({
      writeErr: (text) => {
        said += text;
      },
    });
  try {
    await root.parseAsync(args, { from: "user" });
  } catch (error) {
    if (error instanceof UserError) {
      assert.equal(error.exitCode, 2);
      return error.message;
    }
    assert.ok(error instanceof CommanderError && error.exitCode !== 0, String(error));
    return said.split("\n")[0]!;
  }
  assert.fail(`${args.join(" ")} was accepted`);
}

test("a quota with which no guest can start is refused", () => {
  assert.throws(() => quotaFrames({ frames: 100 }, 1024), { code: "ERR_COIOMMU_USER" });
  assert.equal(quotaFrames({ percent: 10 }, 1024), 26214);
});

const DEVICE = ["--device", "0000:00:06.0"];

/** Each sentence names the flag, what was given, and the accepted form. */
for (const [flag, values, form] of [
  ["--machine", ["vm", ""], /one of auto, qemu, embedded/],
  ["--memory", ["5", "1X", "100M", "2T", "1.3M", "-1G", ""], /such as 512M or 2G/],
  ["--cpus", ["0", "65", "1.5", "two", ""], /whole number from 1 to 64/],
  ["--accel", ["hvf", ""], /one of auto, tcg, kvm/],
  ["--front-end", ["vfio", ""], /one of virtio-iommu, crosvm/],
  ["--policy", ["mru", "lru,passes=2", ""], /policy|parameters/],
  [
    "--speculate",
    ["luck", "ghost,budget=0", "off,budget=1", "stride,repeats", ""],
    /speculation|budget takes|parameter|repeats takes/,
  ],
  ["--interval", ["1", "1h", "5ms", "2d", "-1s"], /such as 1s or 500ms/],
  ["--quota", ["0", "0%", "101%", "1.5", "lots"], /such as 10%/],
  ["--before-activation", ["nothing", ""], /one of bios, all, none/],
  ["--activation-timeout", ["0", "never", "5ms", "2h"], /such as 60s, or off/],
  ["--pinner", ["mlock", ""], /one of auto, vfio, iommufd, io_uring, software/],
  ["--device", ["06.0", "0001:00:06.0", "nvme0", ""], /PCI function of this machine, such as 0000:01:00\.0/],
  [
    "--workload",
    ["fio:rw=erase", "fio:bs=4q", "idle:1", "nic:size=1", "gpu:hold=0", "nothing", "script:/nonexistent"],
    /--workload/,
  ],
  ["--disk-size", ["1M", "big"], /such as 512M or 2G/],
  ["--strategy", ["all", ""], /one of none, static, viommu-strict, viommu-lazy, coiommu/],
  ["--api", ["localhost:8080", ":80", "", "a".repeat(108)], /path of a Unix socket/],
] as const)
  for (const value of values)
    test(`run ${flag} "${value}" is refused in a sentence`, async () => {
      const sentence = await refusal("run", flag, value);
      assert.ok(sentence.includes(flag), sentence);
      assert.match(sentence, form);
    });

for (const [args, form] of [
  [["compare", "--strategies", "none,none"], /--strategies.*twice/],
  [
    ["compare", "--strategies", "none,best"],
    /--strategies.*one of none, static, viommu-strict, viommu-lazy, coiommu/,
  ],
  [["compare", "--workload", "shell"], /--workload shell.*coiommu run/],
  [["run", "--machine", "embedded", "--workload", "shell"], /--workload shell: needs a VM/],
  [["run", "--machine", "embedded", "--accel", "kvm"], /--accel kvm: needs a VM/],
  [
    ["run", "--machine", "qemu", "--workload", "nic:mode=fresh"],
    /--workload nic:mode=fresh: needs --machine embedded/,
  ],
  [["run", "--speculate", "ghost", "--strategy", "static"], /--speculate ghost: only strategy coiommu/],
  [
    ["compare", "--speculate", "stride", "--strategies", "none,viommu-lazy"],
    /--speculate stride: only strategy coiommu/,
  ],
  [["attach", "--qmp", "qmp.sock", "--speculate", "luck"], /--speculate luck: no speculation is named/],
  [["run", "--front-end", "crosvm", "--strategy", "viommu-lazy"], /--front-end crosvm: .* viommu-lazy/],
  [
    ["compare", "--front-end", "crosvm", "--strategies", "coiommu,viommu-strict"],
    /--front-end crosvm: .* viommu-strict/,
  ],
  [["run", "--pinner", "vfio"], /--pinner vfio: .*name one with --device/],
  [["attach", "--qmp", "q", "--pinner", "iommufd"], /--pinner iommufd: .*name one with --device/],
  [["run", "--overwrite-device"], /--overwrite-device: there is no --device/],
  [["run", ...DEVICE, "--pinner", "io_uring"], /--pinner io_uring: .* what vfio or iommufd pins only/],
  [["run", ...DEVICE, "--pinner", "software"], /--pinner software: .*vfio or iommufd/],
  [["run", ...DEVICE, "--machine", "qemu"], /--device 0000:00:06\.0: needs --machine embedded/],
  [["run", ...DEVICE, "--machine", "embedded", "--accel", "tcg"], /--accel tcg: needs a VM/],
  [["run", ...DEVICE, "--strategy", "none"], /--device 0000:00:06\.0: strategy none pins nothing/],
  [
    ["compare", ...DEVICE, "--strategies", "coiommu,viommu-lazy"],
    /--device .*: strategy viommu-lazy gives it/,
  ],
  [["run", ...DEVICE, "--disk", "a.img"], /--device .*: --disk is another one/],
  [["run", ...DEVICE, "--fault-capable"], /--device .*: it is not --fault-capable/],
  [["run", ...DEVICE, "--workload", "nic:mode=fresh"], /--device .*: --workload nic:mode=fresh has no use/],
  [
    ["run", ...DEVICE, "--workload", "fio:rw=randrw"],
    /--device .* writes, .*--overwrite-device if it may be/,
  ],
  [
    ["compare", ...DEVICE, "--workload", "fio:rw=write"],
    /--device .* writes, .*--overwrite-device if it may be/,
  ],
  [["compare", "--rounds", "0"], /--rounds.*whole number from 1 to 100/],
  [["attach"], /required option '--qmp <socket>' not specified/],
  [["attach", "--qmp", "q", "--assigned", "00:05"], /--assigned.*such as 0000:00:05\.0/],
  [["attach", "--qmp", "q", "--activation-timeout", "1"], /--activation-timeout.*such as 60s, or off/],
  [["attach", "--qmp", "q", "--before-activation", "all"], /unknown option '--before-activation'/],
  [["attach", "--qmp", "q", "--quota", "0"], /--quota.*such as 10%/],
  [["run", "--turbo"], /unknown option '--turbo'/],
  [["runn"], /unknown command 'runn'/],
  [["run", "extra"], /too many arguments/],
  [["run", "--memory"], /--memory.*argument missing/],
] as const)
  test(`${args.join(" ")} is refused in a sentence`, async () => {
    assert.match(await refusal(...args), form);
  });
