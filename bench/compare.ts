/** Things measured in one run, alternating, because machines have moods. */

export interface Spread {
  readonly min: number;
  readonly median: number;
  readonly max: number;
}

export interface Series {
  /** Nanoseconds per operation. */
  readonly time: Spread;
  /** Over the first series' time in the same round. */
  readonly ratio: Spread;
}

const WARM_UP_ROUNDS = 2;

/** Each function returns nanoseconds per operation. Who goes first changes from round to round. */
export function compare<Name extends string>(
  rounds: number,
  measure: Readonly<Record<Name, () => number>>,
): Record<Name, Series> {
  const names = Object.keys(measure) as Name[];
  const times = Object.fromEntries(names.map((name) => [name, []])) as unknown as Record<Name, number[]>;
  for (let round = -WARM_UP_ROUNDS; round < rounds; round++)
    for (let i = 0; i < names.length; i++) {
      const name = names[(i + round + WARM_UP_ROUNDS) % names.length]!;
      const time = measure[name]();
      if (round >= 0) times[name].push(time);
    }
  const reference = times[names[0]!];
  return Object.fromEntries(
    names.map((name): [Name, Series] => {
      const ratios = times[name].map((time, round) => time / reference[round]!);
      return [name, { time: spread(times[name]), ratio: spread(ratios) }];
    }),
  ) as Record<Name, Series>;
}

export function spread(values: readonly number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  return { min: sorted[0]!, median: sorted[sorted.length >> 1]!, max: sorted.at(-1)! };
}
