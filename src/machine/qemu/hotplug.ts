import { UserError } from "../../base/errors.ts";
import type { Bdf } from "../../base/units.ts";
import { settles } from "./deadline.ts";
import type { Qmp } from "./qmp.ts";

/** What of `query-pci` is looked at (QEMU qapi/pci.json). */
interface PciDevice {
  readonly bus: number;
  readonly slot: number;
  readonly function: number;
  readonly qdev_id: string;
  readonly pci_bridge?: { readonly bus: { readonly secondary: number }; readonly devices?: PciDevice[] };
}
interface PciBus {
  readonly bus: number;
  readonly devices: readonly PciDevice[];
}

/** A PCI function that QEMU has. */
export interface QemuFunction {
  /** As the guest, or its firmware, has numbered the buses. */
  readonly bdf: Bdf;
  /** "" for one without. */
  readonly id: string;
}

/** Without those behind a bridge that firmware has not numbered yet. */
export async function pciFunctions(qmp: Pick<Qmp, "execute">): Promise<QemuFunction[]> {
  const buses = await qmp.execute<PciBus[]>("query-pci");
  return buses.flatMap((root) =>
    flat(root.devices)
      .filter((d) => d.bus !== root.bus || root.devices.includes(d))
      .map((d) => ({ bdf: bdfOf(d), id: d.qdev_id })),
  );
}

const flat = (devices: readonly PciDevice[]): PciDevice[] =>
  devices.flatMap((device) => [device, ...flat(device.pci_bridge?.devices ?? [])]);
const bdf = (bus: number, slot: number, fn: number): Bdf => ((bus << 8) | (slot << 3) | fn) as Bdf;
const bdfOf = (d: PciDevice): Bdf => bdf(d.bus, d.slot, d.function);

interface Place {
  readonly bdf: Bdf;
  readonly properties: Readonly<Record<string, string>>;
}

/** The first free slot of the root bus, then ports behind which nothing is. */
function freePlaces(root: PciBus): Place[] {
  const taken = new Set(root.devices.map((device) => device.slot));
  const slot = Array.from({ length: 32 }, (_, i) => i).find((i) => !taken.has(i));
  const onRoot =
    slot === undefined ? [] : [{ bdf: bdf(0, slot, 0), properties: { addr: slot.toString(16) } }];
  const ports = flat(root.devices).flatMap(({ qdev_id, pci_bridge }) => {
    const free = pci_bridge && qdev_id !== "" && !pci_bridge.devices?.length;
    // Without a number while the firmware has not come to it.
    if (!free || pci_bridge.bus.secondary === 0) return [];
    return [{ bdf: bdf(pci_bridge.bus.secondary, 0, 0), properties: { bus: qdev_id, addr: "0" } }];
  });
  return [...onRoot, ...ports];
}

const NO_HOTPLUG = /does not support hotplugging/;

/**
 * Plug a device where this machine lets one: into the root bus (machine "pc"), else into a free root port (q35, whose
 * root bus takes none). `before` is told the place before each attempt, `refused` when there can be none.
 */
export async function plug(
  qmp: Qmp,
  device: Readonly<Record<string, unknown>>,
  { before, refused }: { before(bdf: Bdf): Promise<void>; refused(bdf: Bdf): Promise<void> },
): Promise<Bdf> {
  const [root] = await qmp.execute<PciBus[]>("query-pci");
  for (const place of root ? freePlaces(root) : []) {
    await before(place.bdf);
    try {
      await qmp.execute("device_add", { ...device, ...place.properties });
      return place.bdf;
    } catch (error) {
      await refused(place.bdf);
      if (!NO_HOTPLUG.test((error as Error).message)) throw error;
    }
  }
  throw new UserError(
    "this QEMU has no free place for one more PCI device while it runs: start it with -machine pc, or with one " +
      "-device pcie-root-port,id=NAME,chassis=N,slot=N for each device, and attach when the firmware has run",
    1,
  );
}

/** A guest that lets go of a function does so within a second. */
export const LET_GO_MS_MAX = 10_000;

/** Ask the guest to let go of a device; `gone`: when it has. False when it has not in time: it still may. */
export async function unplug(
  qmp: Qmp,
  id: string,
  gone: Promise<void>,
  patienceMs: number,
): Promise<boolean> {
  // QEMU refuses to ask twice, which is no news: what counts is whether it goes.
  qmp.execute("device_del", { id }).catch(() => {});
  return await settles(gone, patienceMs);
}
