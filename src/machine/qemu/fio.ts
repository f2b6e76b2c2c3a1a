import { UserError } from "../../base/errors.ts";
import { type FioWorkload, WRITTEN_REGION, writes } from "../workload-text.ts";
import type { GuestAgent } from "./agent.ts";

/** Of the measured phase only; the fields of `coiommu run --json`. */
export interface FioResult {
  ops: number;
  iops: number;
  bytesPerSecond: number;
  /** From submission, with the kernel's mapping of the buffer, to completion. */
  latencyUs: { p50: number; p99: number };
  /** After writes: is every block of the region whole and at its place? Null when nothing was written. */
  verified: boolean | null;
  errors: number;
}

const KIB = 1024;
/** Filling and checking use large requests, to be quick; every block in them has a checksum of its own. */
const CHECK_REQUEST = 256 * KIB;
/** Slower than any guest; a bound for the time that fio may take. */
const CHECKED_PER_SECOND_MIN = 4 * KIB * KIB;

/**
 * fio's jobs, one after the other: fill (every block of the region gets a header with checksum and offset), the
 * measured one, check (read the region, compare). fio's own verification would not do: a job that ends by time
 * ends before it verifies, and its reads would count as the workload's. `verify_fatal`: without it fio 3.33
 * forgets a bad block when a good one follows in the same request.
 */
export function fioArguments(workload: FioWorkload, device: string): string[] {
  const { rw, blockSize, ioDepth, seconds } = workload;
  const measured = [
    "--name=measured",
    "--stonewall",
    `--rw=${rw}`,
    `--bs=${blockSize}`,
    `--iodepth=${ioDepth}`,
  ];
  measured.push(
    "--time_based",
    `--runtime=${seconds}`,
    "--continue_on_error=all",
    "--unified_rw_reporting=mixed",
  );
  const common = [`--filename=${device}`, "--ioengine=libaio", "--direct=1", "--lat_percentiles=1"];
  if (!writes(workload))
    return [...common, ...(workload.size === undefined ? [] : [`--size=${workload.size}`]), ...measured];
  const request = Math.max(blockSize, CHECK_REQUEST - (CHECK_REQUEST % blockSize));
  const wanted = workload.size ?? WRITTEN_REGION;
  const region = Math.max(request, wanted - (wanted % request));
  const whole = [`--bs=${request}`, "--iodepth=8"];
  return [
    ...common,
    ...[`--size=${region}`, "--verify=crc32c", `--verify_interval=${blockSize}`, "--verify_state_save=0"],
    ...["--name=fill", "--rw=write", ...whole, "--do_verify=0"],
    ...[...measured, "--do_verify=0"],
    ...["--name=check", "--stonewall", "--rw=read", ...whole, "--verify_fatal=1"],
  ];
}

/** Run the workload in the guest, on its first virtio disk. */
export async function runFio(
  agent: GuestAgent,
  workload: FioWorkload,
  device = "/dev/vda",
): Promise<FioResult> {
  const words = fioArguments(workload, device).join(" ");
  // Newer releases of fio also compare seeds, which a job that only reads cannot know.
  const script = `cd /tmp
${writes(workload) ? "fio --cmdhelp=verify_header_seed 2>&1 | grep -q '^No such' || seed=--verify_header_seed=0" : ""}
fio --output-format=json --output=fio.json ${words} $seed
cat fio.json`;
  const checked = writes(workload) ? (workload.size ?? WRITTEN_REGION) : 0;
  const timeoutMs = (workload.seconds + 60 + checked / CHECKED_PER_SECOND_MIN) * 1000;
  const { output } = await agent.run(script, { timeoutMs, what: "the workload fio" });
  return parseFioOutput(output);
}

interface FioStatistics {
  total_ios: number;
  iops: number;
  bw_bytes: number;
  lat_ns: { percentile?: Record<string, number> };
}

interface FioJob {
  jobname: string;
  error: number;
  total_err?: number;
  read?: FioStatistics;
  mixed?: FioStatistics;
}

/** fio's JSON, and before it, what fio complained about. */
export function parseFioOutput(output: string): FioResult {
  const start = output.search(/^\{/m);
  const complaint = (start < 0 ? output : output.slice(0, start)).trim();
  const failed = () => new UserError(`fio failed in the guest: ${complaint || "it said nothing"}`, 1);
  if (start < 0) throw failed();
  const { jobs } = JSON.parse(output.slice(start)) as { jobs: FioJob[] };
  const named = (name: string) => jobs.find((job) => job.jobname === name);
  const statistics = named("measured")?.mixed;
  if (!statistics || statistics.total_ios === 0) throw failed();
  const check = named("check");
  const percentile = (p: string) => (statistics.lat_ns.percentile?.[p] ?? 0) / 1000;
  return {
    ops: statistics.total_ios,
    iops: statistics.iops,
    bytesPerSecond: statistics.bw_bytes,
    latencyUs: { p50: percentile("50.000000"), p99: percentile("99.000000") },
    verified: check ? check.error === 0 && (check.read?.total_ios ?? 0) > 0 : null,
    errors: jobs.reduce((sum, job) => sum + (job.total_err ?? (job.error === 0 ? 0 : 1)), 0),
  };
}
