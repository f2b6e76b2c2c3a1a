import { HostError, PeerError } from "../base/errors.ts";
import type { Bdf } from "../base/units.ts";
import { drainFd } from "../host/eventfd.ts";
import { closeFd } from "../host/libc.ts";
import { FdMapper } from "../host/mapping.ts";
import { Reactor } from "../host/reactor.ts";
import { UnixSocket } from "../host/socket.ts";
import { CommandServer, type WorkerBase } from "../machine/commands.ts";
import type { TrackerOptions } from "../tracking/tracker.ts";
import { MpqemuServer } from "../transport/mpqemu.ts";
import { type AssignedFunction, HostSide, type HostSideData, type Stopped } from "./host-side.ts";

export interface BackendData extends HostSideData {
  readonly wakeFd: number;
  /** Our end of the mpqemu socket pair. */
  readonly socketFd: number;
  /** Eventfd on which devices ask for frames that they touch. */
  readonly touchFd: number;
}

/**
 * The backend of a VM: one thread, a reactor around poll(2), the single owner of the pin ledger. PIN requests are
 * served first; an unpin pass runs in slices between them.
 */
export class Backend {
  readonly #data: BackendData;
  readonly #reactor = new Reactor();
  readonly #socket: UnixSocket;
  readonly #mapper: FdMapper;
  readonly #host: HostSide;
  readonly #server: MpqemuServer;
  readonly #commands: CommandServer;
  #connected = true;
  #stopping = false;

  constructor(data: BackendData & WorkerBase, openTable?: TrackerOptions["openTable"]) {
    this.#data = data;
    this.#socket = new UnixSocket(data.socketFd);
    this.#host = new HostSide(data, (...told) => this.#commands.tell(...told), openTable);
    this.#mapper = new FdMapper(this.#host.present);
    this.#server = new MpqemuServer({
      socket: this.#socket,
      function: this.#host.function,
      map: (fd, offset, size) => this.#mapper.map(fd, offset, size),
      closeFd,
      memory: (regions) => this.#host.setMemory(regions),
    });
    this.#commands = new CommandServer(data, {
      ...this.#host.commands,
      started: () => this.#host.started(),
      assign: (assigned: AssignedFunction) => this.#host.assign(assigned),
      unassign: (bdf: Bdf) => this.#host.unassign(bdf),
      deviceEnded: (gate: number) => this.#host.deviceEnded(gate),
      stop: () => this.#stop(),
      ...this.#host.dirtyCommands,
    });
    this.#reactor.watch(data.wakeFd, () => {
      drainFd(data.wakeFd);
      this.#commands.serve();
    });
    this.#reactor.watch(data.socketFd, () => this.#serve());
    this.#reactor.watch(data.touchFd, () => {
      drainFd(data.touchFd);
      this.#host.serveDevices();
    });
  }

  /** Serve until told to stop. */
  run(): void {
    while (!this.#stopping) this.#reactor.run(this.#host.work());
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

  #stop(): Stopped {
    this.#stopping = true;
    const stopped = this.#host.stop(() => this.#disconnect());
    this.#mapper.close();
    return stopped;
  }

  #disconnect(): void {
    if (!this.#connected) return;
    this.#connected = false;
    this.#reactor.unwatch(this.#data.socketFd);
    this.#socket.close();
  }
}
