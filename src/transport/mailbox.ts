import { SharedWords } from "../memory/shared-words.ts";
import type { PciFunction } from "../virtio/device.ts";

/** The first word: set when the server is taken for dead. Then per client, one cache line: */
const DEAD = 0;
const PER_CLIENT = 16;
const STATE = 0;
const OPERATION = 1;
const SIZE = 2;
const ADDRESS = 3;
/** 64 bits each, low word first. */
const VALUE = 5;

const IDLE = 0;
const ASKED = 1;
const ANSWERED = 2;

const CONFIG_READ = 1;
const CONFIG_WRITE = 2;
const BAR_READ = 3;
const BAR_WRITE = 4;
const RESET = 5;

/** A server that takes longer is taken for dead: it may be inside a slice of an unpin pass, or a large PIN. */
const ANSWER_LIMIT_MS = 5000;

const baseOf = (client: number): number => (1 + client) * PER_CLIENT;

export const mailboxBuffer = (clients: number): SharedArrayBuffer =>
  new SharedArrayBuffer(4 * baseOf(clients));

function store64(words: SharedWords, at: number, value: bigint): void {
  words.store(at, Number(BigInt.asIntN(32, value)));
  words.store(at + 1, Number(BigInt.asIntN(32, value >> 32n)));
}
const load64 = (words: SharedWords, at: number): bigint =>
  (BigInt(words.load(at + 1) >>> 0) << 32n) | BigInt(words.load(at) >>> 0);

export interface MailboxClientOptions {
  /** From mailboxBuffer(). */
  readonly buffer: SharedArrayBuffer;
  /** This client's number: each CPU of the guest has its own, so that none waits for another. */
  readonly client: number;
  /** Wakes the server. */
  ring(): void;
  readonly answerLimitMs?: number;
}

/**
 * A PCI function that another thread of this process serves: each access waits for its answer, as on a bus. When the
 * server is dead, reads give all ones and writes are dropped, which is how a function behaves that has left the bus.
 */
export class MailboxFunction implements PciFunction {
  readonly #words: SharedWords;
  readonly #base: number;
  readonly #ring: () => void;
  readonly #limit: number;

  constructor({ buffer, client, ring, answerLimitMs = ANSWER_LIMIT_MS }: MailboxClientOptions) {
    this.#words = new SharedWords(buffer);
    this.#base = baseOf(client);
    this.#ring = ring;
    this.#limit = answerLimitMs;
  }

  configRead(offset: number, size: number): number {
    return Number(this.#access(CONFIG_READ, offset, size, 0n));
  }
  configWrite(offset: number, size: number, value: number): void {
    this.#access(CONFIG_WRITE, offset, size, BigInt(value));
  }
  barRead(address: number, size: number): bigint {
    return this.#access(BAR_READ, address, size, 0n);
  }
  barWrite(address: number, size: number, value: bigint): void {
    this.#access(BAR_WRITE, address, size, value);
  }
  reset(): void {
    this.#access(RESET, 0, 1, 0n);
  }

  /** What was read, in the size asked for. */
  #access(operation: number, address: number, size: number, value: bigint): bigint {
    const words = this.#words;
    const at = this.#base;
    const allOnes = (1n << BigInt(8 * size)) - 1n;
    if (words.load(DEAD)) return allOnes;
    words.store(at + OPERATION, operation);
    words.store(at + SIZE, size);
    store64(words, at + ADDRESS, BigInt(address));
    store64(words, at + VALUE, value);
    // ORDERING: sequentially consistent, as all of these: the request is seen before its state. PAIRS WITH serve().
    words.store(at + STATE, ASKED);
    this.#ring();
    words.wait(at + STATE, ASKED, this.#limit);
    if (words.load(at + STATE) !== ANSWERED) {
      words.store(DEAD, 1);
      return allOnes;
    }
    words.store(at + STATE, IDLE);
    return load64(words, at + VALUE) & allOnes;
  }
}

/** The thread that has the function. */
export class MailboxServer {
  readonly #words: SharedWords;
  readonly #function: PciFunction;

  constructor(buffer: SharedArrayBuffer, pciFunction: PciFunction) {
    this.#words = new SharedWords(buffer);
    this.#function = pciFunction;
  }

  /** Answer every access that waits. One per client, so this is bounded. */
  serve(): void {
    const words = this.#words;
    for (let at = baseOf(0); at < words.length; at += PER_CLIENT) {
      // A client that has given up has moved on: its access must not happen any more.
      if (words.load(at + STATE) !== ASKED || words.load(DEAD)) continue;
      store64(words, at + VALUE, this.#perform(at));
      words.store(at + STATE, ANSWERED);
      words.notify(at + STATE);
    }
  }

  #perform(at: number): bigint {
    const words = this.#words;
    const size = words.load(at + SIZE);
    const address = Number(load64(words, at + ADDRESS));
    const value = load64(words, at + VALUE);
    switch (words.load(at + OPERATION)) {
      case CONFIG_READ:
        return BigInt(this.#function.configRead(address, size));
      case CONFIG_WRITE:
        this.#function.configWrite(address, size, Number(value));
        return 0n;
      case BAR_READ:
        return this.#function.barRead(address, size);
      case BAR_WRITE:
        this.#function.barWrite(address, size, value);
        return 0n;
      default:
        this.#function.reset();
        return 0n;
    }
  }
}
