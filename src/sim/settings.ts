import { type Random, random } from "../base/random.ts";
import type { BeforeActivation } from "../tracking/life.ts";
import type { FrontEndName } from "../virtio/front-end.ts";
import { AT_ONCE, lifeOf } from "./driver-arrival.ts";

/** As `--policy` takes them, with times of the size of a world's. */
export const POLICIES = [
  ...["lru", "lru", "off", "generations,threshold=2", "clock,passes=2", "pressure"],
  "working-set,min=0ms,max=4ms,ghosts=4",
] as const;

/** As `--speculate` takes them. */
export const SPECULATIONS = [
  ...["off", "neighbours,budget=3,judged=40", "neighbours,budget=1", "ghost,budget=4", "stride,repeats=1"],
  "ghost,together=1ms,ghosts=6,judged=20",
] as const;

/** How a world is made: everything that a seed decides, beside the schedule. */
export interface Settings {
  /** The PCI function that guest and backend meet at. */
  readonly frontEnd: FrontEndName;
  readonly cpus: number;
  readonly devices: number;
  /** Frames that buffers lie in: the fewer, the more CPUs and the unpinner meet in one. */
  readonly buffers: number;
  /** Milliseconds between two unpin passes. */
  readonly interval: number;
  /** At first; operators choose others, and at the end all is unpinned by lru. */
  readonly policy: string;
  /** At first, as the policy. */
  readonly speculate: string;
  /** Frames; Infinity for no limit. */
  readonly quota: number;
  readonly beforeActivation: BeforeActivation;
  /** Milliseconds until everything is pinned, if no driver is active by then. */
  readonly activationTimeout: number;
  /** Milliseconds from power-on until the driver is loaded, or when everything is pinned. */
  readonly driverComes: number | "when all is pinned";
  /** One in so many host calls, accesses or chances, on average; 0 for never. */
  readonly pinFails: number;
  readonly releaseFails: number;
  readonly kickLost: number;
  readonly backendDies: number;
  readonly machineResets: number;
  readonly operator: number;
  /** The driver turns PIN off and on again at times. */
  readonly driverRestarts: boolean;
  /** A CPU writes garbage where it may. */
  readonly hostile: boolean;
  /** The driver negotiates PIN_DIRTY. */
  readonly pinDirty: boolean;
  /** Milliseconds between two harvests of dirty frames; Infinity for none. */
  readonly harvestInterval: number;
  /** Frames in a slice of one. */
  readonly harvestSlice: number;
  /** A device moves between the table and a domain, whose unmapped addresses are taken back at once or in batches. */
  readonly remapping: "none" | "strict" | "lazy";
  /** CPUs put frames into a balloon. */
  readonly balloon: boolean;
  /** One more device, which may fault on what no driver has mapped. */
  readonly faultCapable: boolean;
  /** Devices access what they must not; one in so many chances the driver reads the reports. 0: neither. */
  readonly strays: number;
  /** A CPU maps what it can, and lets no device use it. */
  readonly selfish: boolean;
  /** Mappings of the IOMMU that the host pins with, maybe without a limit; 0: it pins pages as often as asked. */
  readonly mappings: number;
}

export function settingsOf(seed: number): Settings {
  const next = random(seed ^ 0x5e77_1265);
  const sometimes = (oneIn: number, value: number) => (next(oneIn) === 0 ? value : 0);
  const settings: { -readonly [K in keyof Settings]: Settings[K] } = {
    frontEnd: "virtio-iommu",
    cpus: 1 + next(3),
    devices: 1 + next(2),
    buffers: 2 + next(12),
    interval: (1 + next(10)) / 5,
    policy: POLICIES[random(seed ^ 0x9011_c1e5)(POLICIES.length)]!,
    speculate: SPECULATIONS[random(seed ^ 0x59ec_0a7e)(SPECULATIONS.length)]!,
    quota: next(2) === 0 ? Number.POSITIVE_INFINITY : 8 + next(16),
    beforeActivation: next(2) === 0 ? "bios" : "none",
    ...AT_ONCE,
    pinFails: sometimes(2, 20),
    releaseFails: sometimes(2, 10),
    kickLost: sometimes(4, 30),
    backendDies: sometimes(8, 1000),
    machineResets: sometimes(6, 150),
    driverRestarts: next(3) === 0,
    hostile: next(5) === 0,
    operator: sometimes(3, 20),
    pinDirty: next(4) > 0,
    harvestInterval: next(3) > 0 ? (1 + next(10)) / 5 : Number.POSITIVE_INFINITY,
    harvestSlice: 1 + next(8),
    remapping: "none",
    balloon: random(seed ^ 0xba11_0000)(3) === 0,
    faultCapable: random(seed ^ 0x0fa1_7ed0)(2) === 0,
    strays: [0, 4, 60][random(seed ^ 0x57ea_7000)(3)]!,
    selfish: random(seed ^ 0x5e1f_1540)(4) === 0,
    mappings: mappingsOf(random(seed ^ 0x10_33a7)),
  };
  // Who takes over from a backend that died in a machine reset cannot tell what was discarded before: ADR 4, 36.
  if (settings.machineResets > 0 && settings.backendDies > 0) settings.balloon = false;
  // A lone CPU that only holds what it has takes no step, nor does a pass that tries nothing: nobody would go on.
  if (settings.cpus === 1) settings.selfish = false;
  if (next(5) > 0) {
    const late = { ...settings, ...lifeOf(random(seed ^ 0x571c), settings) };
    return withDomains(late, random(seed ^ 0xd0a1_d0a1));
  }
  // Its drivers know no second kick and no second activation, and cannot say that their table is complete.
  const impossible = {
    kickLost: 0,
    backendDies: 0,
    driverRestarts: false,
    beforeActivation: "none",
  } as const;
  return { ...settings, ...impossible, frontEnd: "crosvm" };
}

const mappingsOf = (next: Random): number =>
  next(3) > 0 ? 0 : next(4) === 0 ? Number.POSITIVE_INFINITY : 4 + next(12);

/** The same with a second device that moves, or not. */
function withDomains(settings: Settings, next: Random): Settings {
  if (next(3) > 0) return settings;
  // Its driver, as Linux's, does not take its domains up again on another device.
  const impossible = { backendDies: 0, driverRestarts: false } as const;
  return { ...settings, ...impossible, devices: 2, remapping: next(2) === 0 ? "strict" : "lazy" };
}
