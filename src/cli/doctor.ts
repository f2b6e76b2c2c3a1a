import { existsSync, readdirSync } from "node:fs";
import { styleText } from "node:util";
import { Command } from "commander";
import { IoUringPinner } from "../host/io-uring-pinner.ts";
import { nativeUnavailable } from "../host/libc.ts";
import { canExceedMemlock, memlockLimit } from "../host/limits.ts";
import { PresentMappings } from "../host/present-mappings.ts";
import { type Check, diagnose } from "../machine/qemu/doctor.ts";
import { writeJson } from "./output.ts";

export const doctorCommand = (): Command =>
  new Command("doctor")
    .description("What this machine can do: one line each, with the fix.")
    .option("--json <file>", "write the result as JSON, to a file or to - (standard output)")
    .action(async (options: { json?: string }) => {
      const checks = [...(await diagnose()), native(), ioUring(), memlock(), embedded(), ...optionalParts()];
      const width = Math.max(...checks.map((c) => c.name.length));
      if (options.json !== "-")
        for (const { name, ok, detail, fix } of checks) {
          const mark = ok
            ? paint("green", "ok     ")
            : fix === null
              ? paint("blue", "without")
              : paint("red", "missing");
          process.stdout.write(
            `${mark} ${name.padEnd(width)}  ${detail}${fix === null ? "" : `; fix: ${fix}`}\n`,
          );
        }
      writeJson(options.json, { schema: "coiommu.doctor/1", checks });
      if (checks.some((c) => !c.ok && c.fix !== null)) process.exitCode = 1;
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

function memlock(): Check {
  const limit = memlockLimit();
  if (canExceedMemlock()) return { name: "memlock", ok: true, detail: "no limit (CAP_IPC_LOCK)", fix: null };
  const detail = Number.isFinite(limit) ? `${Math.floor(limit / 1024)} KiB may be pinned` : "no limit";
  return limit >= MEMLOCK_MIN
    ? { name: "memlock", ok: true, detail, fix: null }
    : {
        name: "memlock",
        ok: false,
        detail,
        fix: "ulimit -l unlimited (limits.conf, or LimitMEMLOCK= of a service)",
      };
}

/** No reason to fail. */
function optionalParts(): Check[] {
  const groups = existsSync("/dev/vfio") ? readdirSync("/dev/vfio").filter((name) => /^\d+$/.test(name)) : [];
  const pressure = "/proc/pressure/memory";
  return [
    {
      name: "PSI",
      ok: existsSync(pressure),
      detail: existsSync(pressure)
        ? `${pressure}, for --policy pressure`
        : "this kernel says no memory pressure",
      fix: null,
    },
    {
      name: "VFIO",
      ok: groups.length > 0,
      detail: groups.length > 0 ? `groups ${groups.join(", ")}` : "no device is bound to vfio-pci",
      fix: null,
    },
    {
      name: "iommufd",
      ok: existsSync("/dev/iommu"),
      detail: existsSync("/dev/iommu") ? "/dev/iommu" : "this kernel has no /dev/iommu",
      fix: null,
    },
  ];
}
