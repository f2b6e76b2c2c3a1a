import { existsSync } from "node:fs";
import { styleText } from "node:util";
import { Command } from "commander";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { nativeUnavailable } from "../host/libc.ts";
import { canExceedMemlock, MEMLOCK_SLACK, memlockFix, memlockHardLimit } from "../host/limits.ts";
import { PresentMappings } from "../host/present-mappings.ts";
import { type Check, diagnose } from "../machine/qemu/doctor.ts";
import { vfioChecks } from "./doctor-vfio.ts";
import { writeJson } from "./output.ts";

export const doctorCommand = (): Command =>
  new Command("doctor")
    .description("What this machine can do: one line each, with the fix.")
    .option("--json <file>", "write the result as JSON, to a file or to - (standard output)")
    .action(async (options: { json?: string }) => {
      const checks = [
        ...(await diagnose()),
        native(),
        ioUring(),
        memlockCheck(canExceedMemlock() ? undefined : memlockHardLimit()),
        embedded(),
        pressure(),
        ...vfioChecks(),
      ];
      const width = Math.max(...checks.map((c) => c.name.length));
      if (options.json !== "-")
        for (const { name, ok, detail, fix, optional } of checks) {
          const mark = ok
            ? paint("green", "ok     ")
            : optional || fix === null
              ? paint("blue", "without")
              : paint("red", "missing");
          process.stdout.write(
            `${mark} ${name.padEnd(width)}  ${detail}${fix === null ? "" : `; fix: ${fix}`}\n`,
          );
        }
      writeJson(options.json, { schema: "coiommu.doctor/1", checks });
      if (checks.some((c) => !c.ok && c.fix !== null && !c.optional)) process.exitCode = 1;
    });

/** Colours only on a terminal. */
const paint = (colour: "green" | "blue" | "red", text: string): string =>
  styleText(colour, text, { stream: process.stdout });

function native(): Check {
  const reason = nativeUnavailable();
  const fix = "npm install (the package koffi brings binaries for Linux on x64 and arm64)";
  return reason === undefined
    ? { name: "native module", ok: true, detail: "koffi loads: system calls for VMs and pins", fix: null }
    : { name: "native module", ok: false, detail: reason, fix };
}

/** Always there: said, because it is what is left where a VM cannot be had. */
const embedded = (): Check => {
  const detail = "runs on Node alone: guest CPUs are threads (--machine embedded)";
  return { name: "embedded", ok: true, detail, fix: null };
};

function ioUring(): Check {
  const reason = nativeUnavailable() ?? IoUringPinner.unavailable();
  const fix = "allow io_uring (sysctl kernel.io_uring_disabled=0, or the container's seccomp profile)";
  if (reason !== undefined) return { name: "io_uring", ok: false, detail: reason, fix };
  const singles = PresentMappings.unavailable();
  const how = singles === undefined ? "registered buffers" : `each page for itself: ${singles}`;
  return { name: "io_uring", ok: true, detail: `pins guest memory (${how})`, fix: null };
}

/** Enough for the firmware window and the buffers of a small guest. */
const MEMLOCK_MIN = 64 * 2 ** 20;
/** All of a guest of 1 GiB, as `run` makes one unasked. */
const MEMLOCK_FOR_ALL = 2 ** 30 + MEMLOCK_SLACK;

/** `limit`: what this process may raise its limit to, in bytes; undefined: none counts. */
export function memlockCheck(limit: number | undefined): Check {
  const name = "memlock";
  if (limit === undefined) return { name, ok: true, detail: "no limit (CAP_IPC_LOCK)", fix: null };
  if (limit === Number.POSITIVE_INFINITY) return { name, ok: true, detail: "no limit", fix: null };
  const detail = `${Math.floor(limit / 1024)} KiB may be pinned`;
  const forAll = memlockFix(MEMLOCK_FOR_ALL);
  if (limit < MEMLOCK_MIN) return { name, ok: false, detail, fix: forAll };
  const enough = limit >= MEMLOCK_FOR_ALL;
  return {
    name,
    ok: true,
    detail: enough ? detail : `${detail}; all of a guest of 1 GiB: ${forAll}`,
    fix: null,
  };
}

/** No reason to fail. */
function pressure(): Check {
  const path = "/proc/pressure/memory";
  return existsSync(path)
    ? { name: "PSI", ok: true, detail: `${path}, for --policy pressure`, fix: null }
    : { name: "PSI", ok: false, detail: "this kernel says no memory pressure", fix: null, optional: true };
}
