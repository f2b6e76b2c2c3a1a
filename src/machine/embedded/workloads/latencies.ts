/** Buckets per power of two: a value is known to 1/16. */
const PARTS = 16;
/** Three days. */
const NS_MAX = 2 ** 48 - 1;
const BUCKETS = bucketOf(NS_MAX) + 1;

/** How often which time was seen, in bounded memory. Plain numbers, so that it can be sent and added up. */
export class Latencies {
  readonly counts = new Float64Array(BUCKETS);

  record(ns: number): void {
    this.counts[bucketOf(Math.min(Math.max(0, Math.floor(ns)), NS_MAX))]!++;
  }

  add(counts: Float64Array): void {
    for (let i = 0; i < BUCKETS; i++) this.counts[i]! += counts[i]!;
  }

  /** The time that a share of `p` did not exceed, in ns; undefined when nothing was recorded. */
  percentile(p: number): number | undefined {
    const total = this.counts.reduce((sum, n) => sum + n, 0);
    let left = Math.ceil(total * p);
    for (let i = 0; i < BUCKETS; i++) {
      left -= this.counts[i]!;
      if (left <= 0 && total > 0) return highestOf(i);
    }
    return undefined;
  }
}

/** Values below PARTS have a bucket each; above, each power of two has PARTS. */
function bucketOf(value: number): number {
  let shift = 0;
  let scaled = value;
  for (; scaled >= 2 * PARTS; shift++) scaled = Math.floor(scaled / 2);
  return shift * PARTS + scaled;
}

function highestOf(bucket: number): number {
  if (bucket < PARTS) return bucket;
  const shift = Math.floor(bucket / PARTS) - 1;
  return (PARTS + (bucket % PARTS) + 1) * 2 ** shift - 1;
}
