import { InvalidArgumentError } from "commander";
import { UserError } from "../base/errors.ts";
import { type Bdf, FRAME_SIZE, milliseconds, type Nanoseconds, parseBdf } from "../base/units.ts";

/** Values as people write them. Each throws what commander prints after the flag's name: the accepted form. */

const SIZE_UNITS: Readonly<Record<string, number>> = {
  "": 1,
  K: 2 ** 10,
  M: 2 ** 20,
  G: 2 ** 30,
  T: 2 ** 40,
};

/** "512M", "2G" -> MiB. */
export function parseMemoryMiB(text: string): number {
  const match = /^(\d+(?:\.\d+)?)([KMGT])(?:i?B)?$/i.exec(text);
  const mib = match ? (Number(match[1]) * SIZE_UNITS[match[2]!.toUpperCase()]!) / 2 ** 20 : Number.NaN;
  if (!Number.isInteger(mib) || mib < 128 || mib > 2 ** 20)
    throw new InvalidArgumentError("It takes a size from 128M to 1T in whole MiB, such as 512M or 2G.");
  return mib;
}

export const parseCount =
  (min: number, max: number) =>
  (text: string): number => {
    const n = /^\d+$/.test(text) ? Number(text) : Number.NaN;
    if (!(n >= min && n <= max))
      throw new InvalidArgumentError(`It takes a whole number from ${min} to ${max}.`);
    return n;
  };

/** "1s", "500ms", "adaptive". */
export const parseIntervalOrAdaptive = (text: string): Nanoseconds | "adaptive" => {
  if (text === "adaptive") return text;
  try {
    return parseInterval(text);
  } catch {
    throw new InvalidArgumentError("It takes a time from 10ms to 3600s, such as 1s or 500ms, or adaptive.");
  }
};

/** "1s", "500ms". */
export function parseInterval(text: string): Nanoseconds {
  const match = /^(\d+(?:\.\d+)?)(ms|s)$/.exec(text);
  const ms = match ? Number(match[1]) * (match[2] === "s" ? 1000 : 1) : Number.NaN;
  if (!(ms >= 10 && ms <= 3_600_000))
    throw new InvalidArgumentError("It takes a time from 10ms to 3600s, such as 1s or 500ms.");
  return milliseconds(ms);
}

/** "60s", "500ms", "off". */
export function parseTimeout(text: string): number {
  if (text === "off") return Number.POSITIVE_INFINITY;
  try {
    return parseInterval(text);
  } catch {
    throw new InvalidArgumentError("It takes a time from 10ms to 3600s, such as 60s, or off.");
  }
}

/** "5%" -> 0.05. */
export function parseShare(text: string): number {
  const match = /^(\d+(?:\.\d+)?)%$/.exec(text);
  const share = match ? Number(match[1]) / 100 : Number.NaN;
  if (!(share <= 1)) throw new InvalidArgumentError("It takes a share from 0% to 100%, such as 5%.");
  return share;
}

/** "10%" or a number of frames. */
export type Quota = { readonly percent: number } | { readonly frames: number };

export function parseQuota(text: string): Quota {
  const match = /^(\d+(?:\.\d+)?)(%?)$/.exec(text);
  const n = match ? Number(match[1]) : Number.NaN;
  const valid = match?.[2] === "%" ? n > 0 && n <= 100 : Number.isInteger(n) && n > 0;
  if (!valid)
    throw new InvalidArgumentError(
      "It takes a share of guest memory such as 10%, or a number of 4 KiB frames.",
    );
  return match![2] === "%" ? { percent: n } : { frames: n };
}

/** Firmware's window is 256 frames; a disk's rings and requests need about as many. */
const QUOTA_FRAMES_MIN = 512;

/** In frames; Infinity without a quota. Throws UserError for one with which no guest can start. */
export function quotaFrames(quota: Quota | undefined, memoryMiB: number): number {
  if (quota === undefined) return Number.POSITIVE_INFINITY;
  const share = (percent: number) => Math.floor((memoryMiB * 2 ** 20 * percent) / 100 / FRAME_SIZE);
  const frames = "frames" in quota ? quota.frames : share(quota.percent);
  if (frames >= QUOTA_FRAMES_MIN) return frames;
  throw new UserError(
    `--quota: ${frames} frames are too few for a guest to start; give ${QUOTA_FRAMES_MIN} or more`,
  );
}

/** sun_path has 108 bytes, the last of which is 0. */
const SOCKET_PATH_BYTES_MAX = 107;

export function parseSocketPath(text: string): string {
  if (/^[^/]*:\d+$/.test(text))
    throw new InvalidArgumentError("It takes the path of a Unix socket; the API is not served over TCP.");
  if (text === "" || Buffer.byteLength(text) > SOCKET_PATH_BYTES_MAX)
    throw new InvalidArgumentError(
      `It takes the path of a Unix socket, of 1 to ${SOCKET_PATH_BYTES_MAX} bytes.`,
    );
  return text;
}

export const parseOneOf =
  <T extends string>(values: readonly T[]) =>
  (text: string): T => {
    if (!values.includes(text as T)) throw new InvalidArgumentError(`It takes one of ${values.join(", ")}.`);
    return text as T;
  };

/** "none,static": a list without repetition. */
export const parseListOf =
  <T extends string>(values: readonly T[]) =>
  (text: string): T[] => {
    const list = text.split(",").map(parseOneOf(values));
    if (new Set(list).size !== list.length) throw new InvalidArgumentError("It names something twice.");
    return list;
  };

/** "0000:00:05.0,0000:00:06.0": functions of segment 0, as lspci names them. */
export const parseBdfs = (text: string): Bdf[] =>
  text.split(",").map((word) => {
    const bdf = parseBdf(word);
    if (bdf === undefined)
      throw new InvalidArgumentError("It takes functions as `lspci -D` names them, such as 0000:00:05.0.");
    return bdf;
  });
