import { CommandServer, type WorkerBase } from "../machine/commands.ts";
import { type GuestRam, ramRegions } from "../machine/embedded/ram.ts";
import { Bell } from "../memory/bell.ts";
import type { TrackerOptions } from "../tracking/tracker.ts";
import { MailboxServer } from "../transport/mailbox.ts";
import { HostSide, type HostSideData, type Stopped } from "./host-side.ts";

export interface EmbeddedBackendData extends HostSideData {
  readonly ram: GuestRam;
  /** Rings for register accesses, for devices that ask for frames, and for commands. */
  readonly bell: SharedArrayBuffer;
  readonly mailbox: SharedArrayBuffer;
}

/** The backend of an embedded guest: as that of a VM, but it sleeps on a bell. */
export class EmbeddedBackend {
  readonly #host: HostSide;
  readonly #bell: Bell;
  readonly #mailbox: MailboxServer;
  readonly #commands: CommandServer;
  #stopping = false;

  constructor(data: EmbeddedBackendData & WorkerBase, openTable?: TrackerOptions["openTable"]) {
    this.#bell = new Bell(data.bell);
    this.#host = new HostSide(data, (...told) => this.#commands.tell(...told), openTable);
    this.#mailbox = new MailboxServer(data.mailbox, this.#host.function);
    this.#commands = new CommandServer(data, {
      ...this.#host.commands,
      started: () => this.#host.started(),
      stop: () => this.#stop(),
      ...this.#host.dirtyCommands,
    });
    const regions = ramRegions(data.ram).map((region) => ({
      ...region,
      presentAddress: this.#host.present?.of(region.hostAddress, region.size),
    }));
    this.#host.setMemory(regions);
  }

  /** Serve until told to stop. */
  run(): void {
    while (!this.#stopping) {
      const { rings } = this.#bell;
      this.#mailbox.serve();
      this.#host.serveDevices();
      this.#commands.serve();
      if (!this.#stopping) this.#bell.sleep(rings, this.#host.work());
    }
  }

  #stop(): Stopped {
    this.#stopping = true;
    return this.#host.stop(() => {});
  }
}
