import type { PciFunction } from "../virtio/device.ts";
import { step, type Turn } from "./turn.ts";

/** A register access of a guest CPU, on its way to the device and back. */
export interface Access {
  readonly kind: keyof PciFunction;
  readonly address: number;
  readonly size: number;
  readonly value: bigint;
  /** A write to the notify page: QEMU 7.2 loses some. */
  readonly kick: boolean;
  answer: bigint | undefined;
}

/** The notify page in BAR0 is the last. */
const NOTIFY = 0x3000;
/** The PCI bus: accesses wait for the device one after the other, and the CPU waits for its answer. */
export class Bus {
  readonly pending: Access[] = [];

  /** The function as the CPU whose turn this is sees it. */
  seenBy(turn: Turn): PciFunction {
    const access = (kind: Access["kind"], address: number, size: number, value = 0n): bigint => {
      const sent = step(turn, "access", () => {
        const kick = kind === "barWrite" && address >= NOTIFY;
        const made: Access = { kind, address, size, value, kick, answer: undefined };
        this.pending.push(made);
        turn.changed();
        return made;
      });
      turn.until(() => sent.answer !== undefined);
      return sent.answer!;
    };
    return {
      configRead: (offset, size) => Number(access("configRead", offset, size)),
      configWrite: (offset, size, value) => void access("configWrite", offset, size, BigInt(value)),
      barRead: (address, size) => access("barRead", address, size),
      barWrite: (address, size, value) => void access("barWrite", address, size, value),
      reset: () => {},
    };
  }

  /** Let the device do the oldest access; `lost`: it never gets there. */
  deliver(device: PciFunction, lost: boolean): void {
    const access = this.pending[0]!;
    const { kind, address, size, value } = access;
    let answer = allOnes(size);
    if (!lost)
      switch (kind) {
        case "configRead":
          answer = BigInt(device.configRead(address, size));
          break;
        case "configWrite":
          device.configWrite(address, size, Number(value));
          break;
        case "barRead":
          answer = device.barRead(address, size);
          break;
        case "barWrite":
          device.barWrite(address, size, value);
          break;
      }
    access.answer = answer;
    this.pending.shift();
  }

  /** The device is gone: reads give all ones, as on a real bus. */
  drop(): void {
    for (const access of this.pending.splice(0)) access.answer = allOnes(access.size);
  }
}

const allOnes = (size: number): bigint => 2n ** BigInt(8 * size) - 1n;
