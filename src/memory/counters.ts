/**
 * Named numbers in shared memory: one thread writes, any thread reads, nobody waits. A 64-bit aligned store is not
 * torn on the machines we run on; a reader may see two counters of different moments.
 */
export type Counters<Name extends string> = Record<Name, number>;

export const countersBuffer = (names: readonly string[]): SharedArrayBuffer =>
  new SharedArrayBuffer(8 * names.length);

export function counters<Name extends string>(
  names: readonly Name[],
  buffer: SharedArrayBuffer,
): Counters<Name> {
  const values = new Float64Array(buffer);
  const view = {} as Counters<Name>;
  names.forEach((name, i) => {
    Object.defineProperty(view, name, {
      enumerable: true,
      get: () => values[i],
      set: (value: number) => {
        values[i] = value;
      },
    });
  });
  return view;
}

/** What several have counted, by name. */
export const sums = <Name extends string>(
  names: readonly Name[],
  of: readonly Readonly<Counters<Name>>[],
): Counters<Name> =>
  Object.fromEntries(names.map((name) => [name, of.reduce((sum, c) => sum + c[name], 0)])) as Counters<Name>;
