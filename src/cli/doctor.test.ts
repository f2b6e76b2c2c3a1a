import assert from "node:assert/strict";
import test from "node:test";
import { memlockCheck } from "./doctor.ts";
import { type Files, vfioChecks } from "./doctor-vfio.ts";

const MIB = 2 ** 20;

test("memlock: missing below what a small guest needs, and the number for all of a guest wherever it is not enough", () => {
  const ulimit = "`ulimit -l 1049600`, or LimitMEMLOCK=1049600K of the service";
  const told = (limit: number | undefined) => {
    const { ok, detail, fix } = memlockCheck(limit);
    return [ok, detail, fix];
  };
  assert.deepEqual(told(8 * MIB), [false, "8192 KiB may be pinned", ulimit]);
  assert.deepEqual(told(64 * MIB), [
    true,
    `65536 KiB may be pinned; all of a guest of 1 GiB: ${ulimit}`,
    null,
  ]);
  assert.deepEqual(told(1025 * MIB), [true, "1049600 KiB may be pinned", null]);
  assert.deepEqual(told(Number.POSITIVE_INFINITY), [true, "no limit", null]);
  assert.deepEqual(told(undefined), [true, "no limit (CAP_IPC_LOCK)", null]);
});

/** A machine that has all: two functions of one group are bound, and this user may use everything. */
const ALL: Record<string, string | readonly string[]> = {
  "/sys/kernel/iommu_groups": ["0", "1", "2"],
  "/sys/bus/pci/drivers/vfio-pci": ["0000:00:06.0", "0000:00:06.1", "bind", "new_id"],
  "/sys/bus/pci/devices/0000:00:06.0/iommu_group": "2",
  "/sys/bus/pci/devices/0000:00:06.1/iommu_group": "2",
  "/sys/bus/pci/devices/0000:00:06.0/vfio-dev": ["vfio0"],
  "/sys/bus/pci/devices/0000:00:06.1/vfio-dev": ["vfio1"],
  "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit": "65535",
  "/dev/vfio/vfio": "",
  "/dev/iommu": "",
};
const TYPE1 = "0000:00:06.0 (group 2), 0000:00:06.1 (group 2)";

/** Each line of a machine that differs so: [ok, detail, fix]. */
function said(change: Partial<typeof ALL>, unusable: readonly string[] = []): Record<string, unknown[]> {
  const has: Partial<typeof ALL> = { ...ALL, ...change };
  const text = (path: string) => (typeof has[path] === "string" ? has[path] : undefined);
  const files: Files = {
    list: (path) => (Array.isArray(has[path]) ? has[path] : []),
    link: text,
    text,
    exists: (path) => has[path] !== undefined,
    usable: (path) => !unusable.includes(path),
  };
  const checks = vfioChecks(files);
  assert.ok(
    checks.every(({ ok, optional }) => ok || optional),
    "nothing of this makes doctor fail",
  );
  return Object.fromEntries(checks.map(({ name, ok, detail, fix }) => [name, [ok, detail, fix]]));
}

test("a machine that has all says what there is", () => {
  assert.deepEqual(said({}), {
    IOMMU: [true, "3 groups of PCI functions and others", null],
    VFIO: [true, `${TYPE1}; 65535 mappings for each container (dma_entry_limit)`, null],
    iommufd: [true, "/dev/iommu, vfio0, vfio1", null],
  });
});

const driver = "/sys/bus/pci/drivers/vfio-pci";
const override = "echo vfio-pci >/sys/bus/pci/devices/BDF/driver_override";
const ownFiles = ["0", "1"].map((n) => `/sys/bus/pci/devices/0000:00:06.${n}/vfio-dev`);
for (const [what, name, absent, unusable, detail, fix] of [
  [
    "no IOMMU",
    "IOMMU",
    ["/sys/kernel/iommu_groups"],
    [],
    /^none is in use/,
    /VT-d or AMD-Vi .* intel_iommu=on/,
  ],
  [
    "no function",
    "VFIO",
    [driver],
    [],
    /^no function is bound/,
    new RegExp(`^modprobe vfio-pci; ${override}; .*/unbind; .*drivers_probe$`),
  ],
  ["no container", "VFIO", ["/dev/vfio/vfio"], [], /no \/dev\/vfio\/vfio$/, /^modprobe vfio_iommu_type1$/],
  [
    "no permission",
    "VFIO",
    [],
    ["/dev/vfio/2"],
    /may not use \/dev\/vfio\/2$/,
    /^sudo chown \$USER \/dev\/vfio\/2, or/,
  ],
  [
    "no iommufd",
    "iommufd",
    ["/dev/iommu"],
    [],
    /^this kernel has no \/dev\/iommu$/,
    /^modprobe iommufd, or use Linux 6\.6/,
  ],
  [
    "no files of functions",
    "iommufd",
    ownFiles,
    [],
    /no files of single functions/,
    /CONFIG_VFIO_DEVICE_CDEV/,
  ],
  [
    "no permission for iommufd",
    "iommufd",
    [],
    ["/dev/iommu", "/dev/vfio/devices/vfio1"],
    /may not use \/dev\/iommu, \/dev\/vfio\/devices\/vfio1$/,
    /^sudo chown \$USER \/dev\/iommu \/dev\/vfio\/devices\/vfio1, or/,
  ],
] as const)
  test(`${what}: ${name} says so, and what to do`, () => {
    const [ok, found, todo] = said(Object.fromEntries(absent.map((path) => [path, undefined])), unusable)[
      name
    ] as [boolean, string, string];
    assert.equal(ok, false);
    assert.match(found, detail);
    assert.match(todo, fix);
  });

test("a loaded driver is not loaded again, and an iommufd without functions is none that is missing", () => {
  const { VFIO, iommufd } = said({ [driver]: ["bind", "new_id"] });
  assert.match(String(VFIO![2]), /^echo vfio-pci >/);
  assert.deepEqual(iommufd, [true, "/dev/iommu; no function is bound to vfio-pci", null]);
});
