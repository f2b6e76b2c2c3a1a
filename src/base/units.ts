/** Guest frame number: guest physical address / 4096. Always < 2^40. */
export type Gfn = number & { readonly unit: "gfn" };
/** Guest physical address, in bytes. Always < 2^52. */
export type Gpa = number & { readonly unit: "gpa" };
/** Address as a device uses it, in bytes. Equals the GPA while the device's endpoint is in bypass. */
export type Iova = number & { readonly unit: "iova" };
/** PCI bus/device/function, 16 bits: bus << 8 | device << 3 | function. */
export type Bdf = number & { readonly unit: "bdf" };
/** Monotonic time in nanoseconds. A JS number: exact for 104 days of uptime, then to 2 ns. */
export type Nanoseconds = number & { readonly unit: "ns" };

export const FRAME_SHIFT = 12;
export const FRAME_SIZE = 1 << FRAME_SHIFT;
/** GFNs the DTT can index: abi.md section 1, upper levels carry GPA bits 12..51. */
export const GFN_LIMIT = 2 ** 40;

export const gfnOf = (gpa: number): Gfn => Math.floor(gpa / FRAME_SIZE) as Gfn;
export const gpaOf = (gfn: Gfn): Gpa => (gfn * FRAME_SIZE) as Gpa;
export const milliseconds = (ms: number): Nanoseconds => (ms * 1e6) as Nanoseconds;

/** "00:04.0" or "0000:00:04.0"; only segment 0 exists here. */
export function parseBdf(text: string): Bdf | undefined {
  const match = /^(?:0000:)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])$/i.exec(text);
  if (!match) return undefined;
  const [, bus, device, fn] = match;
  return ((Number.parseInt(bus!, 16) << 8) | (Number.parseInt(device!, 16) << 3) | Number(fn)) as Bdf;
}

export const formatBdf = (bdf: Bdf): string => {
  const hex = (n: number) => n.toString(16).padStart(2, "0");
  return `0000:${hex(bdf >> 8)}:${hex((bdf >> 3) & 31)}.${bdf & 7}`;
};

/** The frames that `length` bytes from `gpa` on lie in. */
export const framesIn = (gpa: number, length: number): number[] => {
  const first = gfnOf(gpa);
  return Array.from({ length: gfnOf(gpa + length - 1) - first + 1 }, (_, i) => first + i);
};
