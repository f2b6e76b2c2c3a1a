/**
 * Three kinds of failure, never mixed:
 * - PeerError: the guest or QEMU broke a protocol. Answer, count, carry on.
 * - HostError: the host refused a system call. Propagate, lose nothing.
 * - UserError: the person at the command line asked for what cannot be. One sentence, exit code 2 or 1.
 * `code` is API and what tests assert; `message` is for people.
 */
export abstract class CoiommuError extends Error {
  abstract readonly code: string;
  override get name(): string {
    return this.constructor.name;
  }
}

export abstract class PeerError extends CoiommuError {}

/** An address range that is not guest RAM. */
export class NotGuestRam extends PeerError {
  readonly code = "ERR_COIOMMU_NOT_GUEST_RAM";
  constructor(gpa: number, length: number) {
    super(`${length} bytes at GPA 0x${gpa.toString(16)} are not guest RAM`);
  }
}

/** A device touched a frame that its IOMMU does not map. */
export class DmaFault extends PeerError {
  readonly code = "ERR_COIOMMU_DMA_FAULT";
  readonly gpa: number;
  constructor(gpa: number) {
    super(`DMA to GPA 0x${gpa.toString(16)}, which is not pinned`);
    this.gpa = gpa;
  }
}

/** A peer's message has the wrong size, type or order. */
export class ProtocolError extends PeerError {
  readonly code = "ERR_COIOMMU_PROTOCOL";
}

/** The other end of a socket is gone. */
export class PeerGone extends PeerError {
  readonly code = "ERR_COIOMMU_PEER_GONE";
}

export type Errno = string;

/** A system call of ours failed. `errno` is its symbolic name. */
export class HostError extends CoiommuError {
  readonly code = "ERR_COIOMMU_HOST";
  readonly syscall: string;
  readonly errno: Errno;
  readonly detail: string;
  constructor(syscall: string, errno: Errno, detail = "") {
    super(`${syscall}: ${errno}${detail && ` (${detail})`}`);
    this.syscall = syscall;
    this.errno = errno;
    this.detail = detail;
  }
}

/** What a person asked for cannot be done; the message says what is wrong, where, and what to do. */
export class UserError extends CoiommuError {
  readonly code = "ERR_COIOMMU_USER";
  /** 2: wrong usage; 1: the run failed. */
  readonly exitCode: 1 | 2;
  constructor(message: string, exitCode: 1 | 2 = 2) {
    super(message);
    this.exitCode = exitCode;
  }
}

/** A bug of ours. Not a CoiommuError, so that no reply path swallows it. */
export class InvariantViolation extends Error {}

export function invariant(condition: unknown, message: string): asserts condition {
  if (!condition) throw new InvariantViolation(message);
}
