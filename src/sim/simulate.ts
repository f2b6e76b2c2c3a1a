import { type Settings, settingsOf } from "./settings.ts";
import type { WorldStatistics } from "./statistics.ts";
import { type Twin, World } from "./world.ts";

export interface Failure {
  readonly seed: number;
  /** Steps of the shortest prefix that still fails, before the machine comes to rest. */
  readonly steps: number;
  /** What the checker found in it. */
  readonly message: string;
  readonly stack: string;
}

export interface Outcome {
  readonly settings: Settings;
  readonly statistics: WorldStatistics;
  readonly error: Error | undefined;
}

/** Play one world, with `settings` in place of the seed's. Whatever is thrown in it is a finding: of a checker, or a bug that shows itself. */
export function simulate(
  seed: number,
  steps: number,
  twin?: Twin,
  settings: Partial<Settings> = {},
): Outcome {
  const world = new World(seed, steps, { ...settingsOf(seed), ...settings }, twin);
  let error: Error | undefined;
  try {
    world.run();
  } catch (thrown) {
    error = thrown instanceof Error ? thrown : new Error(String(thrown));
  }
  return { settings: world.settings, statistics: world.statistics, error };
}

/** Cut a failing run down: the fewest steps, by halving, after which coming to rest still fails. */
export function shorten(seed: number, steps: number, failed: Error, twin?: Twin): Failure {
  let error = failed;
  let fails = steps;
  for (let passes = 0; passes < fails; ) {
    const middle = Math.floor((passes + fails) / 2);
    const outcome = simulate(seed, middle, twin);
    if (outcome.error) {
      error = outcome.error;
      fails = middle;
    } else passes = middle + 1;
  }
  return { seed, steps: fails, message: error.message, stack: error.stack ?? error.message };
}
