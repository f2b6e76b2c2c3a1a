/** A frame range: [first GFN, number of frames]. */
export type FrameRange = readonly [gfn: number, nr: number];
/** As in a PIN request. */
export interface PinBatchRange {
  readonly gfn: number;
  nrFrames: number;
}

/**
 * Those frames of `ranges` that are not `pinned`, in requests of at most `rangesMax` ranges, neighbours merged: `send`
 * makes one. As coiommu_pin() in guest/linux/pin.c.
 */
export function pinInBatches(
  ranges: Iterable<FrameRange>,
  rangesMax: number,
  pinned: (gfn: number) => boolean,
  send: (batch: readonly PinBatchRange[]) => void,
): void {
  let batch: PinBatchRange[] = [];
  const flush = () => {
    const full = batch;
    batch = [];
    if (full.length > 0) send(full);
  };
  for (const [first, nr] of ranges)
    for (let gfn = first; gfn < first + nr; gfn++) {
      if (pinned(gfn) || extended(batch.at(-1), gfn)) continue;
      if (batch.length === rangesMax) flush();
      batch.push({ gfn, nrFrames: 1 });
    }
  flush();
}

/** Whether `gfn` is in, or behind, `last`, and so needs no range of its own. */
function extended(last: PinBatchRange | undefined, gfn: number): boolean {
  if (!last || gfn < last.gfn || gfn > last.gfn + last.nrFrames) return false;
  if (gfn === last.gfn + last.nrFrames) last.nrFrames++; // else neighbours in a list share the frame
  return true;
}
