import { Command } from "commander";
import { UserError } from "../base/errors.ts";
import { FRAME_SIZE, formatBdf, type Nanoseconds } from "../base/units.ts";
import { choosePolicy } from "../control/policy-choice.ts";
import { speculationOf } from "../control/speculating.ts";
import type { IntervalChoice } from "../policy/pass-interval.ts";
import type { UnpinPolicy } from "../policy/policy.ts";
import { policies } from "../policy/registry.ts";
import { createSpeculation } from "../policy/speculation/registry.ts";
import type { Speculation } from "../policy/speculation/speculation.ts";
import { Optimal } from "../replay/optimal.ts";
import { type Replayed, replay } from "../replay/replay.ts";
import { readTrace, type Trace } from "../replay/trace.ts";
import { addIntervalOptions, intervalOf, optionOf } from "./machine-options.ts";
import { number, plainTable, writeJson } from "./output.ts";
import { Progress } from "./progress.ts";
import { parseQuota, parseShare, type Quota, quotaFrames } from "./units.ts";

interface ReplayOptions {
  readonly policy: readonly string[];
  readonly speculate: readonly string[];
  readonly interval: Nanoseconds | "adaptive";
  readonly intervalMin?: Nanoseconds;
  readonly intervalMax?: Nanoseconds;
  readonly quota?: Quota;
  readonly pressure: number;
  readonly json?: string;
}

const EXAMPLES = `
Examples:
  coiommu run --workload fio:rw=randread --record disk.log
  coiommu replay disk.log                            every policy, beside what none can beat
  coiommu replay disk.log --policy lru --policy ./mine.ts,depth=3 --interval adaptive`;

export function replayCommand(): Command {
  const command = new Command("replay")
    .description("What each policy would have pinned, and asked for, for the mappings of a recorded run.")
    .argument("<log>", "what `coiommu run --record` has written");
  const option = optionOf(command);
  option(
    "--policy <name>",
    "as for `coiommu run`; may be given more than once (default: each of ours)",
    (text, list) => [...(list as string[]), choosePolicy(text) && text],
    [],
    "",
  );
  option(
    "--speculate <name>",
    "as for `coiommu run`; may be given more than once, and each policy is played with each (default: off)",
    (text, list) => [...(list as string[]), createSpeculation(text as string) && text],
    [],
    "",
  );
  addIntervalOptions(option);
  option("--quota <limit>", "most the guest may have pinned", parseQuota);
  option(
    "--pressure <share>",
    "what policies are told of the host's memory pressure: 5%",
    parseShare,
    0,
    "0%",
  );
  option("--json <file>", "write the result as JSON, to a file or to - (standard output)", (file) => file);
  return command.addHelpText("after", EXAMPLES).action(async (file: string, options: ReplayOptions) => {
    const interval = intervalOf(options);
    const progress = new Progress();
    try {
      progress.step(`reading ${file}`);
      const trace = await readTrace(file);
      if (trace.events.length === 0) throw new UserError(`${file}: nothing is mapped in it`, 1);
      const choices = options.policy.length > 0 ? options.policy : policies.map(({ name }) => name);
      const speculations = options.speculate.length > 0 ? options.speculate : ["off"];
      const rows = choices.flatMap((choice) =>
        speculations.map((speculate) => {
          progress.step(`replaying ${trace.events.length} events under ${choice}, speculation ${speculate}`);
          return replayed(trace, choice, speculate, interval, options);
        }),
      );
      progress.stop();
      tellTrouble(trace, progress);
      const optimal = new Optimal(trace);
      if (options.json !== "-") process.stdout.write(`${tableOf(rows, optimal, trace)}\n`);
      writeJson(options.json, resultOf(trace, rows, optimal));
    } finally {
      progress.stop();
    }
  });
}

interface Row {
  readonly policy: UnpinPolicy;
  readonly speculation: Speculation;
  readonly quota: number;
  readonly outcome: Replayed;
}

function replayed(
  trace: Trace,
  choice: string,
  speculate: string,
  interval: IntervalChoice,
  options: ReplayOptions,
): Row {
  const [policy, speculation] = [choosePolicy(choice), createSpeculation(speculate)];
  const quota = quotaFrames(options.quota, trace.header.memoryMiB);
  const settings = { policy, speculation, interval, quota, pressure: options.pressure };
  return { policy, speculation, quota, outcome: replay(trace, settings) };
}

function tellTrouble({ file, malformed, firstMalformed, unmatchedUnmaps }: Trace, progress: Progress): void {
  if (malformed > 0)
    progress.warn(`${file}: ${malformed} lines are no events, the first one is line ${firstMalformed}`);
  if (unmatchedUnmaps > 0)
    progress.warn(`${file}: ${unmatchedUnmaps} frames are unmapped that are not mapped`);
}

/** Null where `optimal` cannot be compared: fewer operations asked than any policy on request gets along with. */
const ratioToOptimal = ({ asks, frameSeconds }: Replayed, optimal: Optimal): number | null => {
  const least = optimal.frameSeconds(asks);
  return least === undefined || least === 0 ? null : frameSeconds / least;
};

function tableOf(rows: readonly Row[], optimal: Optimal, trace: Trace): string {
  const mib = (frames: number) => number((frames * FRAME_SIZE) / 2 ** 20);
  const head = [
    ...["policy", "speculation", "pin requests", "per 1,000 maps", "after 1 s", "came back"],
    ...["pinned mean, MiB", "peak, MiB", "of optimal"],
  ];
  const seconds = trace.events.at(-1)!.time / 1e9;
  const ends = (["fewest requests", "least pinned"] as const).map((which, i) => {
    const asks = i === 0 ? optimal.asksMin : optimal.asksMax;
    return [
      ...[`optimal, ${which}`, "off", number(asks), number((1000 * asks) / rows[0]!.outcome.maps), "", ""],
      ...[seconds > 0 ? mib(optimal.frameSeconds(asks)! / seconds) : "-", "", "1x"],
    ];
  });
  const played = rows.map(({ policy, speculation, outcome }) => {
    const { pins, maps, steady, frameSeconds, seconds } = outcome;
    const ratio = ratioToOptimal(outcome, optimal);
    return [
      policy.name,
      speculation.name + (pins.speculationStopped ? " (stopped)" : ""),
      number(pins.pinRequests),
      number((1000 * pins.pinRequests) / maps),
      steady.maps > 0 ? number((1000 * steady.pinRequests) / steady.maps) : "-",
      number(pins.framesCameBack),
      seconds > 0 ? mib(frameSeconds / seconds) : "-",
      mib(pins.framesPeak),
      ratio === null ? "-" : `${ratio.toFixed(3)}x`,
    ];
  });
  return plainTable(head, [...played, ...ends]);
}

/** `coiommu.replay/1`. A field that there is no figure for is null. */
const resultOf = (trace: Trace, rows: readonly Row[], optimal: Optimal) => ({
  schema: "coiommu.replay/1",
  trace: {
    files: [trace.file],
    lines: trace.lines,
    events: trace.events.length,
    malformed: trace.malformed,
    lost: trace.lost,
    unmatchedUnmaps: trace.unmatchedUnmaps,
    devices: [...new Set(trace.events.map(({ endpoint }) => formatBdf(endpoint)))],
    durationMs: trace.events.at(-1)!.time / 1e6,
  },
  /** What no policy on request can beat: with so many mappings that ask, at least so much is pinned. */
  optimal: optimal.curve(100).map(([asks, frameSeconds]) => ({ asks, frameSeconds })),
  results: rows.map(({ policy, speculation, quota, outcome }) => {
    const { pins, frameSeconds, seconds } = outcome;
    const framesMean = seconds > 0 ? frameSeconds / seconds : pins.framesNow;
    return {
      strategy: "coiommu",
      policy: policy.name,
      policyParameters: policy.parameters,
      intervalMs: pins.passInterval / 1e6,
      maps: outcome.maps,
      asks: outcome.asks,
      unmaps: outcome.unmaps,
      pins: {
        requests: pins.pinRequests,
        refused: pins.pinRequestsRefused,
        framesPinned: pins.framesPinned,
        framesUnpinned: pins.framesUnpinned,
        framesCameBack: pins.framesCameBack,
        framesSpeculative: pins.framesSpeculative,
        speculation: speculationOf(speculation, pins),
        framesPeak: pins.framesPeak,
        framesMean,
        framesAtEnd: pins.framesNow,
        quotaFrames: Number.isFinite(quota) ? quota : null,
      },
      exits: pins.pinRequests,
      steady: outcome.steady,
      framesPinnedPeak: pins.framesPeak,
      framesPinnedMean: framesMean,
      frameSeconds,
      ofOptimal: ratioToOptimal(outcome, optimal),
      estimated: null,
    };
  }),
});
