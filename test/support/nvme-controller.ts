import { MemoryStore } from "../../src/device/block-store.ts";
import { NvmeController as QueuePairs } from "../../src/device/nvme.ts";
import type { NvmeRegisters } from "../../src/driver/nvme-controller.ts";
import { GatedMemory } from "../../src/memory/gated-memory.ts";
import type { GuestAccess } from "../../src/memory/guest-memory.ts";
import { NVME_SUCCESS, NvmeCompletion, packStatus } from "../../src/wire/nvme.ts";
import * as wire from "../../src/wire/nvme-admin.ts";
import { TestDma, TestPages } from "./dma.ts";
import { ram } from "./guest.ts";
import { zeroCounters } from "./nvme.ts";

type Command = ReturnType<typeof wire.NvmeAdminCommand.read>;
interface Rings {
  readonly at: number;
  readonly size: number;
}

/** What Base says of Create and Delete. */
const INVALID_COMPLETION_QUEUE = 0x100;
const INVALID_QUEUE_ID = 0x101;
const INVALID_QUEUE_SIZE = 0x102;
const INVALID_DELETION = 0x10c;
const INVALID_OPCODE = 0x001;
const INVALID_FIELD = 0x002;

const AT = wire.NvmeProperties.fields;

/**
 * The registers and the admin queue of a controller, before the I/O queues of src/device/nvme.ts: a model of what the
 * specification demands of a driver. It acts when a register is accessed. `stride`: of doorbells.
 */
export class NvmeModel implements NvmeRegisters {
  readonly memory: GuestAccess;
  readonly pairs: QueuePairs;
  readonly counters = zeroCounters();
  queuePairs = 4;
  stride = 4;
  blockShift = 9;
  metadata = 0;
  mdts = 7;
  formats = 1;
  flbas = 0;
  blocks: number;
  capHigh = 0x20;
  queueSizeMax = 1024;
  /** What it does wrong. */
  broken: "never ready" | "fatal" | "silent" | "gone" | "never shut down" | undefined;
  /** Status by opcode of what it refuses. */
  refuses: Record<number, number> = {};
  /** Opcodes, in order; and all that a driver did wrong. */
  readonly commands: number[] = [];
  readonly complaints: string[] = [];
  cc = 0;
  csts = 0;
  #words: Record<number, number> = {};
  #head = 0;
  #tail = 0;
  #posted = 0;
  #completionQueues = new Map<number, Rings>();
  readonly submissionQueues = new Map<number, Rings>();

  constructor(memory: GuestAccess, store: MemoryStore) {
    this.memory = memory;
    this.pairs = new QueuePairs(memory, store, this.counters);
    this.blocks = store.sectors;
  }

  load32(at: number): number {
    if (this.broken === "gone") return 0xffff_ffff;
    if (at === AT.capLow.at) return (4 << 24) | (1 << 16) | (this.queueSizeMax - 1);
    if (at === AT.capHigh.at) return this.capHigh | Math.log2(this.stride / 4);
    if (at === AT.cc.at) return this.cc;
    if (at === AT.csts.at) return this.csts;
    return this.#words[at] ?? 0;
  }

  store32(at: number, value: number): void {
    if (at >= 0x1000) this.#doorbell((at - 0x1000) / this.stride, value);
    else if (at === AT.cc.at) this.#configure(value);
    else {
      if (this.csts & 1) this.complaints.push(`register ${at} is written while it is ready`);
      this.#words[at] = value;
    }
  }

  #configure(value: number): void {
    const enabled = this.cc & 1;
    this.cc = value;
    if (!(value & 1)) {
      if (this.broken !== "never ready") this.csts = 0;
      this.#head = this.#tail = this.#posted = 0;
      for (const id of this.submissionQueues.keys()) this.pairs.deleteQueue(id);
      this.submissionQueues.clear();
      this.#completionQueues.clear();
    } else if (!enabled) {
      if (value !== (0x46_0000 | 1)) this.complaints.push(`CC is ${value.toString(16)}`);
      if (this.broken === "fatal") this.csts = 2;
      else if (this.broken !== "never ready") this.csts = 1;
    } else if ((value & 0xc000) === 0x4000) {
      if (this.submissionQueues.size > 0) this.complaints.push("shut down with I/O queues");
      if (this.broken !== "never shut down") this.csts |= 8;
    }
  }

  #doorbell(index: number, value: number): void {
    if (!Number.isInteger(index)) this.complaints.push("a doorbell that is none");
    if (!(this.csts & 1)) {
      this.complaints.push("a doorbell before it is ready");
      return;
    }
    const [queue, completion] = [index >> 1, index & 1];
    if (queue > 0) {
      if (!this.submissionQueues.has(queue)) this.complaints.push(`a doorbell of queue ${queue}`);
      if (completion) this.pairs.complete(queue, value);
      else this.pairs.submit(queue, value);
    } else if (!completion) {
      this.#tail = value;
      while (this.broken !== "silent" && this.#head !== this.#tail) this.#step();
    }
  }

  #address = (at: number) => (this.#words[at] ?? 0) + (this.#words[at + 4] ?? 0) * 2 ** 32;

  #step(): void {
    const size = ((this.#words[AT.aqa.at] ?? 0) & 0xfff) + 1;
    const raw = new Uint8Array(64);
    this.memory.read(this.#address(AT.asq.at) + 64 * this.#head, raw);
    this.#head = (this.#head + 1) % size;
    const command = wire.NvmeAdminCommand.read(raw);
    this.commands.push(command.opcode);
    const refused = this.refuses[command.opcode];
    const { status, dw0 = 0 } = refused === undefined ? this.#execute(command) : { status: refused };
    const at = this.#address(AT.acq.at) + 16 * (this.#posted % size);
    const phase = Math.floor(this.#posted / size) % 2 === 0 ? 1 : 0;
    this.#posted++;
    const entry = NvmeCompletion.encode({ dw0, sqHead: this.#head, cid: command.cid });
    this.memory.write(at, entry.subarray(0, 14));
    this.memory.store16(at + 14, packStatus(status, false, phase));
  }

  #execute(command: Command): { status: number; dw0?: number } {
    const { opcode, cdw10, cdw11, nsid } = command;
    if (opcode === wire.NVME_ADMIN_IDENTIFY && cdw10 === 1 && nsid === 0) return this.#identify(command);
    if (opcode === wire.NVME_ADMIN_IDENTIFY && cdw10 === 0 && nsid === 1) return this.#identify(command);
    if (opcode === wire.NVME_ADMIN_SET_FEATURES && cdw10 === 7) {
      const pairs = Math.min(this.queuePairs, (cdw11 & 0xffff) + 1);
      return { status: NVME_SUCCESS, dw0: ((pairs - 1) << 16) | (pairs - 1) };
    }
    if (opcode === wire.NVME_ADMIN_CREATE_CQ || opcode === wire.NVME_ADMIN_CREATE_SQ)
      return { status: this.#create(command) };
    if (opcode === wire.NVME_ADMIN_DELETE_SQ || opcode === wire.NVME_ADMIN_DELETE_CQ)
      return { status: this.#delete(command) };
    return { status: opcode === wire.NVME_ADMIN_IDENTIFY ? INVALID_FIELD : INVALID_OPCODE };
  }

  #identify({ cdw10, prp1 }: Command): { status: number } {
    const page = new Uint8Array(4096);
    const ascii = (what: string, size: number) => Buffer.from(what.padEnd(size));
    if (cdw10 === 1)
      wire.NvmeControllerData.write(page, {
        ...{
          serial: ascii("S1", 20),
          model: ascii("a model", 40),
          firmware: ascii("1.0", 8),
          mdts: this.mdts,
        },
      });
    else {
      const blocks = Math.floor(this.blocks / 2 ** (this.blockShift - 9));
      const namespace = { nsze: blocks, ncap: blocks, nlbaf: this.formats - 1, flbas: this.flbas };
      wire.NvmeNamespaceData.write(page, namespace);
      const format = { ms: this.metadata, lbads: this.blockShift };
      wire.NvmeLbaFormat.write(page, format, wire.lbaFormatAt(namespace));
    }
    this.memory.write(prp1, page);
    return { status: NVME_SUCCESS };
  }

  #create({ opcode, prp1, cdw10, cdw11 }: Command): number {
    const [id, size] = [cdw10 & 0xffff, (cdw10 >>> 16) + 1];
    const own = opcode === wire.NVME_ADMIN_CREATE_CQ ? this.#completionQueues : this.submissionQueues;
    if (id === 0 || id > this.queuePairs || own.has(id)) return INVALID_QUEUE_ID;
    if (size < 2 || size > this.queueSizeMax) return INVALID_QUEUE_SIZE;
    if (!(cdw11 & 1) || prp1 % 4096) return INVALID_FIELD;
    if (own === this.submissionQueues) {
      const completion = this.#completionQueues.get(cdw11 >>> 16);
      if (!completion) return INVALID_COMPLETION_QUEUE;
      this.pairs.createQueue(id, { submission: prp1 as never, completion: completion.at as never, size });
    }
    own.set(id, { at: prp1, size });
    return NVME_SUCCESS;
  }

  #delete({ opcode, cdw10: id }: Command): number {
    if (opcode === wire.NVME_ADMIN_DELETE_CQ && this.submissionQueues.has(id)) return INVALID_DELETION;
    const own = opcode === wire.NVME_ADMIN_DELETE_CQ ? this.#completionQueues : this.submissionQueues;
    this.pairs.deleteQueue(id);
    return own.delete(id) ? NVME_SUCCESS : INVALID_QUEUE_ID;
  }
}

/** A model behind an IOMMU that maps what the driver mapped, and what a driver needs. */
export function nvmeModelRig(change: (model: NvmeModel) => void = () => {}) {
  const store = new MemoryStore(2 ** 18);
  const memory = ram(4096);
  const pages = new TestPages(memory, 16, 0x100 - 16);
  const dma = new TestDma(pages);
  const model = new NvmeModel(new GatedMemory(memory, dma.gate), store);
  change(model);
  /** So many looks are what any time is. */
  const cpu = {
    waitFor: (done: () => boolean) => Array.from({ length: 50 }).some(() => done()),
  };
  return { store, memory, pages, dma, model, options: { memory, dma, registers: model, cpu } };
}
