import { HostError, PeerError, UserError } from "../base/errors.ts";
import type { Bdf, Nanoseconds } from "../base/units.ts";
import { monotonicClock } from "../host/clock.ts";
import { drainFd } from "../host/eventfd.ts";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { closeFd } from "../host/libc.ts";
import { canExceedMemlock, memlockLimit } from "../host/limits.ts";
import { FdMapper } from "../host/mapping.ts";
import { Reactor } from "../host/reactor.ts";
import { UnixSocket } from "../host/socket.ts";
import { SoftwarePinner } from "../host/software-pinner.ts";
import { counters } from "../memory/counters.ts";
import { GuestMemory, type GuestRegion } from "../memory/guest-memory.ts";
import { createPolicy } from "../policy/registry.ts";
import type { Pinner } from "../tracking/pinner.ts";
import { SoftwareIommu } from "../tracking/software-iommu.ts";
import {
  TRACKING_COUNTERS,
  Tracker,
  type TrackerOptions,
  type TrackingCounters,
} from "../tracking/tracker.ts";
import { MpqemuServer } from "../transport/mpqemu.ts";
import { VirtioIommu } from "../virtio/iommu.ts";
import { VirtioPciFunction } from "../virtio/pci.ts";
import { CommandServer, type WorkerBase } from "./commands.ts";

export type Strategy = "none" | "static" | "coiommu";
export type PinnerName = "io_uring" | "software";

export interface BackendData {
  /** Our end of the mpqemu socket pair. */
  readonly socketFd: number;
  /** Eventfd on which devices ask for frames that they touch before the guest's driver is active. */
  readonly touchFd: number;
  readonly iommu: SharedArrayBuffer;
  readonly counters: SharedArrayBuffer;
  readonly assigned: readonly Bdf[];
  readonly strategy: Strategy;
  readonly pinner: PinnerName;
  readonly policy: string;
  readonly interval: Nanoseconds;
  /** Frames; Infinity for no limit. */
  readonly quota: number;
}

/** Answer to "started": what stood before the guest's first instruction. */
export interface Started {
  /** Time spent pinning before the guest starts, in ms. */
  readonly pinMs: number;
  /** 0 until QEMU's memory map has arrived: ask again. */
  readonly ramBytes: number;
  readonly kernelSource: Pinner["kernelSource"];
}
/** Answer to "stop". */
export interface Stopped {
  /** Pages that the kernel counted as pinned when the backend began, and after everything was released. */
  readonly kernelPagesBefore: number | null;
  readonly kernelPagesAfter: number | null;
  /** Requests and register accesses that a correct guest never makes. */
  readonly peerErrors: number;
}

/** How long the kernel may take to let go of pins: io_uring releases up to 1 s late on Linux 6.1. */
const RELEASE_LIMIT_MS = 3000;

/**
 * The backend: one thread, a reactor around poll(2), the single owner of the pin ledger. PIN requests are served
 * first; an unpin pass runs in slices between them.
 */
export class Backend {
  readonly #data: BackendData;
  readonly #reactor = new Reactor();
  readonly #socket: UnixSocket;
  readonly #mapper = new FdMapper();
  readonly #memory = new GuestMemory();
  readonly #iommu: SoftwareIommu;
  readonly #pinner: Pinner;
  readonly #counters: TrackingCounters;
  readonly #tracker: Tracker;
  readonly #device: VirtioIommu;
  readonly #function: VirtioPciFunction;
  readonly #server: MpqemuServer;
  readonly #commands: CommandServer;
  readonly #kernelPagesBefore: number | null;
  #connected = true;
  #pinTime = 0;
  /** Why the pins that should stand before the guest starts do not; told by "started". */
  #startFailure: HostError | undefined;
  #started = false;
  #stopping = false;

  constructor(data: BackendData & WorkerBase, openTable?: TrackerOptions["openTable"]) {
    this.#data = data;
    this.#socket = new UnixSocket(data.socketFd);
    this.#iommu = new SoftwareIommu(data.iommu, monotonicClock);
    this.#iommu.setOpen(data.strategy === "none");
    this.#pinner = data.pinner === "io_uring" ? new IoUringPinner() : new SoftwarePinner();
    this.#kernelPagesBefore = this.#pinner.kernelPinnedPages();
    this.#counters = counters(TRACKING_COUNTERS, data.counters);
    this.#tracker = new Tracker({
      memory: this.#memory,
      pinner: this.#pinner,
      iommu: this.#iommu,
      policy: createPolicy(data.policy),
      clock: monotonicClock,
      counters: this.#counters,
      quota: data.quota,
      beforeActivation: { none: "none", static: "all", coiommu: "bios" }[data.strategy] as
        | "none"
        | "all"
        | "bios",
      ...(openTable && { openTable }),
    });
    this.#device = new VirtioIommu({
      memory: this.#memory,
      tracker: this.#tracker,
      assigned: new Set(data.assigned),
      pinPage: data.strategy === "coiommu",
      hostError: (error) => this.#hostFailed(error),
    });
    this.#function = new VirtioPciFunction(this.#device, this.#memory);
    this.#server = new MpqemuServer({
      socket: this.#socket,
      function: this.#function,
      map: (fd, offset, size) => this.#mapper.map(fd, offset, size),
      closeFd,
      memory: (regions) => this.#setMemory(regions),
    });
    this.#commands = new CommandServer(data, this.#reactor, {
      started: () => this.#startedCommand(),
      stop: () => this.#stop(),
    });
    this.#reactor.watch(data.socketFd, () => this.#serve());
    this.#reactor.watch(data.touchFd, () => {
      drainFd(data.touchFd);
      this.#iommu.serveRequests((gfn) => this.#tracker.touchedByFirmware(gfn));
    });
  }

  /** Serve until told to stop. */
  run(): void {
    const { interval } = this.#data;
    let nextPass = monotonicClock.now() + interval;
    let inPass = false;
    while (!this.#stopping) {
      this.#reactor.run(inPass ? 0 : Math.max(0, (nextPass - monotonicClock.now()) / 1e6));
      if (inPass) inPass = this.#tracker.slice();
      else if (monotonicClock.now() >= nextPass) {
        this.#tracker.startPass();
        inPass = true;
        nextPass = monotonicClock.now() + interval;
      }
    }
  }

  #serve(): void {
    try {
      this.#server.serve();
    } catch (error) {
      if (!(error instanceof PeerError || error instanceof HostError)) throw error;
      this.#disconnect();
      this.#commands.tellEnd(error);
    }
  }

  #setMemory(regions: readonly GuestRegion[]): void {
    const before = monotonicClock.now();
    try {
      this.#tracker.setMemory(regions);
    } catch (error) {
      if (!(error instanceof HostError)) throw error;
      this.#hostFailed(error);
    }
    if (!this.#started) this.#pinTime += monotonicClock.now() - before;
  }

  #hostFailed(error: HostError): void {
    if (this.#started) this.#commands.tell("warning", explain(error));
    else this.#startFailure = error;
  }

  #startedCommand(): Started {
    if (this.#startFailure) throw new UserError(explain(this.#startFailure), 1);
    this.#started = this.#memory.size > 0;
    return {
      pinMs: this.#pinTime / 1e6,
      ramBytes: this.#memory.size,
      kernelSource: this.#pinner.kernelSource,
    };
  }

  #stop(): Stopped {
    this.#stopping = true;
    this.#tracker.sampleKernel();
    this.#disconnect();
    this.#memory.setRegions([]);
    const kernelPagesAfter = this.#releaseAll();
    this.#mapper.close();
    return {
      kernelPagesBefore: this.#kernelPagesBefore,
      kernelPagesAfter,
      peerErrors: this.#function.peerErrors + this.#device.badRequests,
    };
  }

  #disconnect(): void {
    if (!this.#connected) return;
    this.#connected = false;
    this.#reactor.unwatch(this.#data.socketFd);
    this.#socket.close();
  }

  /** Release every pin, and wait until the kernel no longer counts them. */
  #releaseAll(): number | null {
    const deadline = monotonicClock.now() + RELEASE_LIMIT_MS * 1e6;
    this.#pinner.close();
    let pages = this.#pinner.kernelPinnedPages();
    while (pages !== this.#kernelPagesBefore && monotonicClock.now() < deadline) {
      new Reactor().run(10); // sleeps: nothing is watched
      pages = this.#pinner.kernelPinnedPages();
    }
    this.#pinner.close();
    return pages;
  }
}

function explain(error: HostError): string {
  if (error.errno !== "ENOMEM" || canExceedMemlock())
    return `the host cannot pin guest memory: ${error.message}`;
  const kib = Math.floor(memlockLimit() / 1024);
  return (
    `the host cannot pin guest memory: the memlock limit of this process is ${kib} KiB; ` +
    "raise it (`ulimit -l unlimited`, or LimitMEMLOCK= of the service), or run as root"
  );
}
