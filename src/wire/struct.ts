/**
 * Byte layouts, declared once and checked when the module loads: a gap, an overlap or a wrong size throws at import.
 * Everything is little-endian.
 */
type Reader<T> = (view: DataView, at: number) => T;
type Writer<T> = (view: DataView, at: number, value: T) => void;

export interface Field<T> {
  readonly at: number;
  readonly size: number;
  readonly read: Reader<T>;
  readonly write: Writer<T>;
}

const field =
  <T>(size: number, read: Reader<T>, write: Writer<T>) =>
  (at: number): Field<T> => ({ at, size, read, write });

export const u8 = field<number>(
  1,
  (v, at) => v.getUint8(at),
  (v, at, x) => v.setUint8(at, x),
);
export const le16 = field<number>(
  2,
  (v, at) => v.getUint16(at, true),
  (v, at, x) => v.setUint16(at, x, true),
);
export const le32 = field<number>(
  4,
  (v, at) => v.getUint32(at, true),
  (v, at, x) => v.setUint32(at, x, true),
);
export const le32s = field<number>(
  4,
  (v, at) => v.getInt32(at, true),
  (v, at, x) => v.setInt32(at, x, true),
);
/**
 * 64-bit as a JS number, for addresses, sizes and frame numbers. Exact below 2^53. Above, a hostile value is
 * rounded but stays above 2^53, so it fails every range check that its exact value would fail.
 */
export const le64 = field<number>(
  8,
  (v, at) => v.getUint32(at, true) + v.getUint32(at + 4, true) * 2 ** 32,
  (v, at, x) => {
    v.setUint32(at, x % 2 ** 32, true);
    v.setUint32(at + 4, Math.min(Math.floor(x / 2 ** 32), 0xffff_ffff), true); // all ones was read as 2^64
  },
);
/** 64-bit where every bit counts: feature masks, "all ones". */
export const le64bits = field<bigint>(
  8,
  (v, at) => v.getBigUint64(at, true),
  (v, at, x) => v.setBigUint64(at, x, true),
);
export const bytes = (size: number) =>
  field<Uint8Array>(
    size,
    (v, at) => new Uint8Array(v.buffer, v.byteOffset + at, size).slice(),
    (v, at, x) => new Uint8Array(v.buffer, v.byteOffset + at, size).set(x.subarray(0, size)),
  );

// biome-ignore lint/suspicious/noExplicitAny: a field's value type is recovered by Value<>
export type Fields = Record<string, Field<any>>;
export type Value<F extends Fields> = { -readonly [K in keyof F]: F[K] extends Field<infer T> ? T : never };

export interface Struct<F extends Fields> {
  readonly name: string;
  readonly size: number;
  readonly fields: F;
  /** Read all fields from `at`. The caller has checked the length. */
  read(from: Uint8Array, at?: number): Value<F>;
  /** Write the given fields; absent ones are left as they are. */
  write(to: Uint8Array, value: Partial<Value<F>>, at?: number): void;
  /** A new buffer with the given fields, others zero, followed by `extra` zero bytes. */
  encode(value: Partial<Value<F>>, extra?: number): Uint8Array<ArrayBuffer>;
}

const viewOf = (b: Uint8Array) => new DataView(b.buffer, b.byteOffset, b.byteLength);

export function struct<F extends Fields>(name: string, size: number, fields: F): Struct<F> {
  let end = 0;
  for (const [key, f] of Object.entries(fields).sort(([, a], [, b]) => a.at - b.at)) {
    if (f.at !== end)
      throw new TypeError(`${name}.${key} is at ${f.at}, but the field before ends at ${end}`);
    end = f.at + f.size;
  }
  if (end !== size)
    throw new TypeError(`${name} is declared with ${size} bytes, but its fields end at ${end}`);

  const entries = Object.entries(fields);
  const write = (to: Uint8Array, value: Partial<Value<F>>, at = 0) => {
    const view = viewOf(to);
    for (const [key, f] of entries) if (value[key] !== undefined) f.write(view, at + f.at, value[key]);
  };
  return {
    name,
    size,
    fields,
    write,
    read(from, at = 0) {
      const view = viewOf(from);
      return Object.fromEntries(entries.map(([key, f]) => [key, f.read(view, at + f.at)])) as Value<F>;
    },
    encode(value, extra = 0) {
      const out = new Uint8Array(size + extra);
      write(out, value);
      return out;
    },
  };
}

/** Where each field begins, in words of 32 bits: for who fills a structure in again and again, as a Uint32Array. */
export function wordsOf<F extends Fields>(layout: Struct<F>): { readonly [K in keyof F]: number } {
  const entries = Object.entries(layout.fields).map(([key, { at }]) => [key, at / 4] as const);
  for (const [key, word] of entries)
    if (!Number.isInteger(word)) throw new TypeError(`${layout.name}.${key} does not begin at a word`);
  return Object.fromEntries(entries) as { [K in keyof F]: number };
}

/** A little-endian number of 1, 2, 4 or 8 bytes, as a register access carries it. */
export function getUint(from: Uint8Array, at: number, size: number): bigint {
  let value = 0n;
  for (let i = size - 1; i >= 0; i--) value = (value << 8n) | BigInt(from[at + i] ?? 0);
  return value;
}

export function putUint(to: Uint8Array, at: number, size: number, value: bigint): void {
  for (let i = 0; i < size; i++) to[at + i] = Number((value >> BigInt(8 * i)) & 0xffn);
}

/** Names of the fields whose last byte is in [at, at + size): those that a write of this range completes. */
export function completedBy<F extends Fields>(layout: Struct<F>, at: number, size: number): Set<keyof F> {
  const last = (f: Field<unknown>) => f.at + f.size - 1;
  return new Set(
    Object.entries(layout.fields)
      .filter(([, f]) => at <= last(f) && last(f) < at + size)
      .map(([name]) => name as keyof F),
  );
}
