/**
 * The C header of the guest module, generated from the layouts and constants of this folder, so that guest and host
 * cannot drift apart. The header asserts at compile time that every struct has the size and offsets declared here,
 * and that what Linux already defines (VIRTIO_IOMMU_S_*, …) agrees with our copy.
 */
import * as crosvm from "./crosvm.ts";
import * as dtt from "./dtt.ts";
import type { Fields, Struct } from "./struct.ts";
import * as viommu from "./virtio-iommu.ts";

type Constants = Record<string, unknown>;

/** Written in hexadecimal, because they are masks. */
const isMask = (name: string) => /^TU_|^PCI_|_PRESENT$|_FLAG_|_REFUSED$|_T_PIN$/.test(name);

const literal = (name: string, value: number) => {
  if (!isMask(name)) return String(value);
  return name.startsWith("TU_") ? `0x${value.toString(16).padStart(8, "0")}u` : `0x${value.toString(16)}`;
};

const padTo = (text: string, columns: number) => {
  const tabs = Math.max(1, Math.ceil((columns - text.length) / 8));
  return text + "\t".repeat(tabs);
};

const define = (name: string, value: string) => `${padTo(`#define ${name}`, 48)}${value}`;

const snake = (camel: string) => camel.replace(/[A-Z]/g, (c) => `_${c.toLowerCase()}`);

function numbers(from: Constants, wanted: (name: string) => boolean): [string, number][] {
  const found: [string, number][] = [];
  for (const [name, value] of Object.entries(from))
    if (typeof value === "number" && wanted(name)) found.push([name, value]);
  // A module's exports come sorted by name; by value within a common prefix they read better.
  const prefix = (name: string) => name.slice(0, name.lastIndexOf("_"));
  const order = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0);
  return found.sort(([a, x], [b, y]) => order(prefix(a), prefix(b)) || x - y || order(a, b));
}

/** What <uapi/linux/virtio_iommu.h> has under the same name: asserted, not defined. */
const isStandard = (name: string) =>
  /^VIRTIO_IOMMU_(F|T|S|ATTACH_F|MAP_F|PROBE_T|RESV_MEM_T|FAULT_R|FAULT_F)_/.test(name) &&
  !name.includes("_PIN");
const isExtension = (name: string) => !isStandard(name) && name !== "VIRTIO_ID_IOMMU";
const extensionName = (name: string) => (name.startsWith("VIRTIO_IOMMU_") ? name : `VIRTIO_IOMMU_${name}`);

const cTypes: Record<number, string> = { 1: "__u8", 2: "__le16", 4: "__le32", 8: "__le64" };

/** A packed C struct, with an array `ranges[]` of `trailing` at its end. */
function cStruct(layout: Struct<Fields>, trailing?: Struct<Fields>): string[] {
  const fields = Object.entries(layout.fields).sort(([, a], [, b]) => a.at - b.at);
  const hasHead = fields[0]?.[0] === "type" && fields[1]?.[0] === "headReserved";
  const lines = [`struct ${layout.name} {`];
  const asserts = [`static_assert(sizeof(struct ${layout.name}) == ${layout.size});`];
  const member = (type: string, name: string) => lines.push(`\t${padTo(type, 40)}${name};`);

  if (hasHead) member("struct virtio_iommu_req_head", "head");
  for (const [key, field] of fields.slice(hasHead ? 2 : 0)) {
    const type = cTypes[field.size];
    member(type ?? "__u8", type ? snake(key) : `${snake(key)}[${field.size}]`);
    asserts.push(`static_assert(offsetof(struct ${layout.name}, ${snake(key)}) == ${field.at});`);
  }
  if (trailing) member(`struct ${trailing.name}`, "ranges[]");
  lines.push("} __packed;");
  return [...lines, ...asserts];
}

function configOffsets(): string[] {
  const appended = Object.entries(viommu.Config.fields).filter(
    ([, f]) => f.at >= viommu.Config.fields.assignedBitmap.at,
  );
  return [
    ...appended.map(([key, f]) => define(`VIRTIO_IOMMU_CONFIG_${snake(key).toUpperCase()}`, String(f.at))),
    define("VIRTIO_IOMMU_CONFIG_SIZE", String(viommu.Config.size)),
    "/* The standard's part ends before ours begins. */",
    "static_assert(sizeof(struct virtio_iommu_config) <= VIRTIO_IOMMU_CONFIG_ASSIGNED_BITMAP);",
    `static_assert(offsetof(struct virtio_iommu_config, bypass) == ${viommu.Config.fields.bypass.at});`,
  ];
}

/** Section 5: the crosvm-compatible function. */
function crosvmFunction(): string[] {
  const name = (own: string) => (/^(PCI|COIOMMU)_/.test(own) ? own : `COIOMMU_${own}`);
  const info = crosvm.PinPagesInfo as unknown as Struct<Fields>;
  return [
    ...numbers(crosvm, () => true).map(([own, value]) => define(name(own), literal(own, value))),
    ...Object.entries(crosvm.CoiommuRegisters.fields).map(([key, f]) =>
      define(`COIOMMU_REG_${snake(key).toUpperCase()}`, String(f.at)),
    ),
    define("COIOMMU_SLOT_SIZE", String(crosvm.CoiommuSlot.size)),
    define("COIOMMU_PIN_PAGES_IN_BATCH", `0x${crosvm.PIN_PAGES_IN_BATCH.toString(16)}ull`),
    "",
    "/* nr_pages frame numbers of 64 bits follow. */",
    ...cStruct(info),
  ];
}

export function guestHeader(): string {
  const pinRange = viommu.PinRange as unknown as Struct<Fields>;
  const reqPin = viommu.ReqPin as unknown as Struct<Fields>;
  return [
    "/* SPDX-License-Identifier: GPL-2.0 */",
    "/*",
    " * Generated from src/wire by tools/generate-guest-header.ts. Do not edit.",
    " * Section numbers are those of docs/abi.md.",
    " */",
    "#ifndef COIOMMU_ABI_H",
    "#define COIOMMU_ABI_H",
    "",
    "#include <linux/build_bug.h>",
    "#include <linux/stddef.h>",
    "#include <linux/types.h>",
    "#include <linux/virtio_ids.h>",
    "#include <uapi/linux/virtio_iommu.h>",
    "",
    "/* Section 1: the DMA Tracking Table */",
    ...numbers(dtt, () => true).map(([name, value]) => define(`COIOMMU_${name}`, literal(name, value))),
    "",
    "/* Section 3: the PIN_PAGE extension of virtio-iommu */",
    ...numbers(viommu, isExtension).map(([name, value]) => define(extensionName(name), literal(name, value))),
    "",
    "/* Section 3: configuration, byte offsets */",
    ...configOffsets(),
    "",
    "/* Section 3: PIN request; the tail lies in the device-writable part. */",
    ...cStruct(pinRange),
    "",
    ...cStruct(reqPin, pinRange),
    "",
    "/* Section 5: the crosvm-compatible PCI function */",
    ...crosvmFunction(),
    "",
    "/* The standard's numbers, as the host side has them */",
    `static_assert(VIRTIO_ID_IOMMU == ${viommu.VIRTIO_ID_IOMMU});`,
    `static_assert(sizeof(struct virtio_iommu_req_head) == ${viommu.ReqHead.size});`,
    `static_assert(sizeof(struct virtio_iommu_req_tail) == ${viommu.ReqTail.size});`,
    ...numbers(viommu, isStandard).map(([name, value]) => `static_assert(${name} == ${value});`),
    "",
    "#endif /* COIOMMU_ABI_H */",
    "",
  ].join("\n");
}
