/** What people write behind --workload: "name:key=value,…", with units as in "64k". */
import { UserError } from "../base/errors.ts";
import { RECEIVE_MODES, type ReceiveMode } from "../driver/receive-buffers.ts";

const PATTERNS = ["read", "write", "randread", "randwrite", "randrw", "rw"] as const;
const TRAFFICS = ["receive", "loopback"] as const;

export interface FioWorkload {
  rw: (typeof PATTERNS)[number];
  blockSize: number;
  ioDepth: number;
  seconds: number;
  /** Bytes of the disk that are used; all of it when absent, except that what writes uses 64 MiB. */
  size?: number;
}

export interface NicWorkload {
  mode: ReceiveMode;
  /** "receive": the device makes packets. "loopback": they are sent, and come back. */
  traffic: (typeof TRAFFICS)[number];
  /** Bytes of a packet. */
  size: number;
  seconds: number;
}

export interface GpuWorkload {
  buffers: number;
  /** Bytes of each. */
  size: number;
  /** How long a buffer stays mapped. */
  holdMs: number;
  ioDepth: number;
  seconds: number;
}

export const FIO_USAGE = "--workload fio:rw=randread,bs=4k,iodepth=32,seconds=5[,size=64M]";
export const NIC_USAGE = `--workload nic:mode=${RECEIVE_MODES.join("|")},traffic=${TRAFFICS.join("|")},size=1500,seconds=5`;
export const GPU_USAGE = "--workload gpu:buffers=4,size=16M,hold=1000,iodepth=8,seconds=5";

/** Where a workload writes when it does not say how much. */
export const WRITTEN_REGION = 2 ** 26;
export const writes = (workload: FioWorkload): boolean => !workload.rw.endsWith("read");

/** "fio:rw=randread,bs=4k,…"; what is left out is as in FIO_USAGE. */
export function parseFioWorkload(text: string): FioWorkload {
  const options = new Options(text, "fio", FIO_USAGE, ["rw", "bs", "iodepth", "seconds", "size"]);
  const rw = options.choice("rw", PATTERNS, "randread", { readwrite: "rw" });
  const blockSize = options.number("bs", "4k", 512, 2 ** 20, "512 to 1M");
  if (blockSize % 512 !== 0) throw options.wrong("bs must be a multiple of 512");
  const ioDepth = options.number("iodepth", "32", 1, 256, "1 to 256");
  const seconds = options.seconds();
  const size = options.has("size") && { size: options.number("size", "", 2 ** 20, 2 ** 50, "1M or more") };
  return { rw, blockSize, ioDepth, seconds, ...size };
}

/** "nic:mode=fresh,size=1500,…"; what is left out is the first choice, and as in NIC_USAGE. */
export function parseNicWorkload(text: string): NicWorkload {
  const options = new Options(text, "nic", NIC_USAGE, ["mode", "traffic", "size", "seconds"]);
  return {
    mode: options.choice("mode", RECEIVE_MODES, "recycled"),
    traffic: options.choice("traffic", TRAFFICS, "receive"),
    size: options.number("size", "1500", 60, 9000, "60 to 9000"),
    seconds: options.seconds(),
  };
}

/** "gpu:buffers=4,size=16M,…"; what is left out is as in GPU_USAGE. */
export function parseGpuWorkload(text: string): GpuWorkload {
  const options = new Options(text, "gpu", GPU_USAGE, ["buffers", "size", "hold", "iodepth", "seconds"]);
  const size = options.number("size", "16M", 2 ** 16, 2 ** 26, "64k to 64M");
  if (size % 4096 !== 0) throw options.wrong("size must be a multiple of 4k");
  return {
    buffers: options.number("buffers", "4", 1, 64, "1 to 64"),
    size,
    holdMs: options.number("hold", "1000", 1, 3_600_000, "milliseconds, 1 to 3600000"),
    ioDepth: options.number("iodepth", "8", 1, 256, "1 to 256"),
    seconds: options.seconds(),
  };
}

/** The options of one workload; every mistake is a UserError that says what is right. */
class Options {
  readonly #text: string;
  readonly #usage: string;
  readonly #given = new Map<string, string>();

  constructor(text: string, name: string, usage: string, keys: readonly string[]) {
    this.#text = text;
    this.#usage = usage;
    const [found, options = ""] = text.split(/:(.*)/s, 2) as [string, string?];
    if (found !== name) throw this.wrong(`"${found}" is not ${name}`);
    for (const option of options.split(",").filter((part) => part !== "")) {
      const [key, value] = option.split("=", 2) as [string, string?];
      if (!keys.includes(key)) throw this.wrong(`unknown option "${key}"`);
      if (!value) throw this.wrong(`${key} has no value`);
      if (this.#given.has(key)) throw this.wrong(`${key} is given twice`);
      this.#given.set(key, value);
    }
  }

  wrong(what: string): UserError {
    return new UserError(`--workload ${this.#text}: ${what}; give ${this.#usage}`, 2);
  }

  has(key: string): boolean {
    return this.#given.has(key);
  }

  number(key: string, otherwise: string, low: number, high: number, form: string): number {
    const value = parseSize(this.#given.get(key) ?? otherwise);
    if (value === undefined || value < low || value > high) throw this.wrong(`${key} must be ${form}`);
    return value;
  }

  seconds(): number {
    return this.number("seconds", "5", 1, 3600, "1 to 3600");
  }

  choice<T extends string>(
    key: string,
    choices: readonly T[],
    otherwise: T,
    synonyms: Record<string, T> = {},
  ): T {
    const text = this.#given.get(key) ?? otherwise;
    const value = choices.find((c) => c === (synonyms[text] ?? text));
    if (value === undefined) throw this.wrong(`${key} must be one of ${choices.join(", ")}`);
    return value;
  }
}

function parseSize(text: string): number | undefined {
  const match = /^(\d{1,15})([kmg]?)$/i.exec(text);
  const shift = { "": 0, k: 10, m: 20, g: 30 }[match?.[2]?.toLowerCase() ?? ""] ?? 0;
  return match ? Number(match[1]) * 2 ** shift : undefined;
}
