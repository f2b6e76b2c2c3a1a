/** Frames as first frame and number of frames, in pairs, ascending and disjoint; a frame may be in `gfns` twice. */
export function rangesOf(gfns: readonly number[]): Float64Array {
  const ranges: number[] = [];
  for (const gfn of Float64Array.from(gfns).sort()) {
    const last = ranges.length - 2;
    if (last >= 0 && gfn <= ranges[last]! + ranges[last + 1]!) ranges[last + 1] = gfn - ranges[last]! + 1;
    else ranges.push(gfn, 1);
  }
  return Float64Array.from(ranges);
}

/** The same one by one, for people and JSON. */
export const listed = (ranges: ArrayLike<number>): { firstFrame: number; frames: number }[] =>
  Array.from({ length: ranges.length / 2 }, (_, i) => ({
    firstFrame: ranges[2 * i]!,
    frames: ranges[2 * i + 1]!,
  }));
