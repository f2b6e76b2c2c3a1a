import { CoiommuError } from "../base/errors.ts";
import { type Gpa, type Iova, milliseconds, type Nanoseconds } from "../base/units.ts";
import type { GuestMemory } from "../memory/guest-memory.ts";
import { NVME_PAGE_SIZE, NVME_SUCCESS } from "../wire/nvme.ts";
import * as wire from "../wire/nvme-admin.ts";
import type { Cpu } from "./cpu.ts";
import type { DmaApi } from "./dma-api.ts";
import { type NvmeDone, type NvmePort, NvmeRings } from "./nvme-rings.ts";

/** BAR 0 of a function; `at` in bytes. */
export interface NvmeRegisters {
  load32(at: number): number;
  /** ORDERING: release; the function sees what was written to memory before. */
  store32(at: number, value: number): void;
}

/** A controller that does not do what it should. It is to be reset before memory that it knows is used otherwise. */
export class NvmeFailed extends CoiommuError {
  readonly code = "ERR_COIOMMU_NVME";
}

/** What the controller and its namespace 1 are; can be sent between threads. */
export interface NvmeIdentity {
  readonly model: string;
  readonly serial: string;
  readonly firmware: string;
  /** Of the namespace, in bytes. */
  readonly size: number;
  /** Bytes of a block. */
  readonly blockSize: number;
  /** Bytes of one command at most; Infinity: no limit. */
  readonly transferMax: number;
  /** I/O queue pairs that it lets us have, and entries of a queue at most. */
  readonly queuePairs: number;
  readonly queueSizeMax: number;
  readonly doorbellStride: number;
}

export interface NvmeControllerOptions {
  readonly memory: GuestMemory;
  readonly dma: DmaApi;
  readonly registers: NvmeRegisters;
  readonly cpu: Cpu;
}

type Command = Partial<ReturnType<typeof wire.NvmeAdminCommand.read>> & { readonly opcode: number };

/** Commands are given one at a time. */
const ADMIN_ENTRIES = 2;
/** As Linux, for a command, and for a shutdown where the controller says no time. */
const COMMAND_LIMIT = milliseconds(60_000);
const SHUTDOWN_LIMIT = milliseconds(5000);
const AT = Object.fromEntries(
  Object.entries(wire.NvmeProperties.fields).map(([name, { at }]) => [name, at]),
) as Record<keyof typeof wire.NvmeProperties.fields, number>;
/** What a function reads as that has left the bus. */
const GONE = 0xffff_ffff;
const LEFT = "the NVMe controller has left the bus";

/** Of the I/O queues of a function: each CPU has a port, and writes the doorbells of its own queue alone. */
export const nvmePort = (registers: NvmeRegisters, stride: number): NvmePort => ({
  submit: (queue, tail) => registers.store32(wire.nvmeDoorbell(queue, stride), tail),
  complete: (queue, head) => registers.store32(wire.nvmeDoorbell(queue, stride) + stride, head),
});

/**
 * A real NVMe controller and its namespace 1, of one CPU, polled: NVM Express Base Specification 2.0, sections 3.5
 * "Controller Initialization" and 3.6 "Shutdown Processing". All throw NvmeFailed, and DmaMapFailed.
 */
export class NvmeController {
  readonly identity: NvmeIdentity;
  readonly #options: NvmeControllerOptions;
  readonly #admin: NvmeRings;
  readonly #readyLimit: Nanoseconds;
  #shutdownLimit = SHUTDOWN_LIMIT;
  #nextId = 0;

  /** From whatever state it is in to one in which it takes I/O queues; asks for `queuePairs`, and may get fewer. */
  constructor(options: NvmeControllerOptions, queuePairs: number) {
    this.#options = options;
    const { memory, dma, registers } = options;
    const capabilities = wire.nvmeCapabilities(this.#get("capLow"), this.#get("capHigh"));
    if (this.#get("csts") === GONE) throw new NvmeFailed(LEFT);
    if (!capabilities.nvm || capabilities.pageMin > NVME_PAGE_SIZE)
      throw new NvmeFailed("the NVMe controller has no NVM command set, or no pages of 4 KiB");
    this.#readyLimit = milliseconds(Math.max(capabilities.readyMs, 500));
    this.#enable(false);
    const port = nvmePort(registers, capabilities.doorbellStride);
    this.#admin = new NvmeRings({ memory, dma, port, id: 0, size: ADMIN_ENTRIES });
    this.#set("aqa", wire.packQueueAttributes(ADMIN_ENTRIES));
    this.#setAddress("asq", this.#admin.submission);
    this.#setAddress("acq", this.#admin.completion);
    this.#enable(true);
    const granted = this.#run("Set Features", {
      opcode: wire.NVME_ADMIN_SET_FEATURES,
      cdw10: wire.NVME_FEATURE_QUEUES,
      cdw11: wire.packQueueCount(queuePairs),
    });
    this.identity = {
      ...this.#identify(capabilities.pageMin),
      queuePairs: Math.min(queuePairs, wire.queuePairsOf(granted.dw0)),
      queueSizeMax: capabilities.queueSizeMax,
      doorbellStride: capabilities.doorbellStride,
    };
  }

  /** `id` from 1 to identity.queuePairs, of at most identity.queueSizeMax entries. */
  createQueue(id: number, { submission, completion, size }: Pick<NvmeRings, QueueField>): void {
    const cdw10 = wire.packQueue(id, size);
    this.#run("Create I/O Completion Queue", {
      ...{ opcode: wire.NVME_ADMIN_CREATE_CQ, prp1: completion, cdw10, cdw11: wire.NVME_CQ_CONTIGUOUS },
    });
    this.#run("Create I/O Submission Queue", {
      ...{ opcode: wire.NVME_ADMIN_CREATE_SQ, prp1: submission, cdw10, cdw11: wire.packSubmission(id) },
    });
  }

  /** Nothing is in flight; afterwards the controller uses its rings no more. */
  deleteQueue(id: number): void {
    this.#run("Delete I/O Submission Queue", { opcode: wire.NVME_ADMIN_DELETE_SQ, cdw10: id });
    this.#run("Delete I/O Completion Queue", { opcode: wire.NVME_ADMIN_DELETE_CQ, cdw10: id });
  }

  /** Its I/O queues are deleted. What it has cached is on its medium when this returns, and no memory is mapped. */
  shutDown(): void {
    this.#set("cc", wire.NVME_CC_CONFIGURATION | wire.NVME_CC_ENABLE | wire.NVME_CC_SHUTDOWN);
    const done = () => (this.#get("csts") & wire.NVME_CSTS_SHST) === wire.NVME_CSTS_SHUT_DOWN;
    this.#await("shut down", done, this.#shutdownLimit);
    this.#enable(false);
    this.#admin.free();
  }

  #identify(pageMin: number) {
    const { dma } = this.#options;
    const page = dma.allocCoherent(wire.NVME_IDENTIFY_SIZE);
    const controller = wire.NvmeControllerData.read(
      this.#identifyPage(page, wire.NVME_IDENTIFY_CONTROLLER, 0),
    );
    const raw = this.#identifyPage(page, wire.NVME_IDENTIFY_NAMESPACE, 1);
    dma.freeCoherent(page.gpa, page.iova, wire.NVME_IDENTIFY_SIZE);
    const namespace = wire.NvmeNamespaceData.read(raw);
    if (namespace.nsze === 0) throw new NvmeFailed("the NVMe controller has no namespace 1");
    const { ms, lbads } = wire.NvmeLbaFormat.read(raw, wire.lbaFormatAt(namespace));
    if (ms !== 0 || lbads < 9 || lbads > 12)
      throw new NvmeFailed(
        `namespace 1 has blocks of 2^${lbads} bytes with ${ms} bytes of metadata: only blocks of 512 to 4096 bytes without any are known here`,
      );
    // RTD3E is in us.
    if (controller.rtd3e > 0)
      this.#shutdownLimit = Math.max(SHUTDOWN_LIMIT, controller.rtd3e * 1000) as Nanoseconds;
    return {
      ...{
        model: text(controller.model),
        serial: text(controller.serial),
        firmware: text(controller.firmware),
      },
      size: namespace.nsze * 2 ** lbads,
      blockSize: 2 ** lbads,
      transferMax: controller.mdts === 0 ? Number.POSITIVE_INFINITY : pageMin * 2 ** controller.mdts,
    };
  }

  #identifyPage(page: { gpa: Gpa; iova: Iova }, cns: number, nsid: number): Uint8Array {
    this.#run("Identify", { opcode: wire.NVME_ADMIN_IDENTIFY, nsid, prp1: page.iova, cdw10: cns });
    const raw = new Uint8Array(wire.NVME_IDENTIFY_SIZE);
    this.#options.memory.read(page.gpa, raw);
    return raw;
  }

  #run(name: string, command: Command): NvmeDone {
    const cid = this.#nextId++ & 0xffff;
    this.#admin.put(wire.NvmeAdminCommand.encode({ ...command, cid }));
    this.#admin.tell();
    let done: NvmeDone | undefined;
    const answered = () => {
      this.#admin.poll((answer) => {
        if (answer.cid === cid) done = answer;
      });
      return done !== undefined;
    };
    this.#await(`answer ${name}`, answered, COMMAND_LIMIT);
    if (done!.status !== NVME_SUCCESS)
      throw new NvmeFailed(`the NVMe controller refuses ${name}: status ${done!.status.toString(16)}h`);
    return done!;
  }

  #enable(on: boolean): void {
    this.#set("cc", on ? wire.NVME_CC_CONFIGURATION | wire.NVME_CC_ENABLE : 0);
    const ready = () => (this.#get("csts") & wire.NVME_CSTS_READY) === Number(on);
    this.#await(on ? "become ready" : "stop", ready, this.#readyLimit);
  }

  #await(what: string, done: () => boolean, limit: Nanoseconds): void {
    let status = 0;
    let finished = false;
    const over = () => {
      status = this.#get("csts");
      finished = status !== GONE && done();
      return finished || (status & wire.NVME_CSTS_FATAL) !== 0; // GONE has that bit too
    };
    const inTime = this.#options.cpu.waitFor(over, limit);
    if (finished) return;
    if (status === GONE) throw new NvmeFailed(LEFT);
    const why = inTime ? "it reports a fatal error (CSTS.CFS)" : `not in ${limit / 1e6} ms`;
    throw new NvmeFailed(`the NVMe controller does not ${what}: ${why}`);
  }

  #get(property: keyof typeof AT): number {
    return this.#options.registers.load32(AT[property]);
  }

  #set(property: keyof typeof AT, value: number): void {
    this.#options.registers.store32(AT[property], value);
  }

  #setAddress(property: "asq" | "acq", address: number): void {
    this.#options.registers.store32(AT[property], address % 2 ** 32);
    this.#options.registers.store32(AT[property] + 4, Math.floor(address / 2 ** 32));
  }
}

type QueueField = "submission" | "completion" | "size";

const text = (ascii: Uint8Array): string => String.fromCharCode(...ascii).trim();
