import { existsSync } from "node:fs";
import { UserError } from "../../base/errors.ts";
import { command, which } from "./command.ts";

/** Tells a person what is being done, one line at a time. */
export type Report = (text: string) => void;

export interface HostTool {
  package: string;
  /** What it is for, in `coiommu doctor`'s words. */
  purpose: string;
  /** A program of the package; of a package without one, a library. */
  program?: string;
  library?: string;
}

/** What a VM run needs installed on the host. What runs *inside* the guest is unpacked into the cache instead. */
export const HOST_TOOLS: readonly HostTool[] = [
  { package: "qemu-system-x86", purpose: "runs the guest", program: "qemu-system-x86_64" },
  { package: "gcc", purpose: "compiles the guest's kernel module", program: "gcc" },
  { package: "make", purpose: "drives the kernel's build system", program: "make" },
  { package: "binutils", purpose: "links and strips the kernel module", program: "readelf" },
  { package: "libelf1", purpose: "objtool, a part of the kernel's build, needs it", library: "libelf.so.1" },
  { package: "xz-utils", purpose: "unpacks stock kernel modules", program: "xz" },
];

const LIBRARY_FOLDERS = ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64"];

/** Where it is; found by its files, because not every machine installs through dpkg. */
export const locate = ({ program, library }: HostTool): string | undefined =>
  program
    ? which(program)
    : LIBRARY_FOLDERS.map((folder) => `${folder}/${library}`).find((path) => existsSync(path));

export const missingPackages = (tools: readonly HostTool[] = HOST_TOOLS): string[] =>
  tools.filter((tool) => !locate(tool)).map((tool) => tool.package);

export const installCommand = (packages: readonly string[]): string =>
  `sudo apt-get install --no-install-recommends ${packages.join(" ")}`;

/** Install what is missing on the host, or say in one sentence what to type. `purpose`: what needs it. */
export async function ensureHostTools(
  report: Report,
  tools: readonly HostTool[] = HOST_TOOLS,
  purpose = "a VM run",
): Promise<void> {
  const missing = missingPackages(tools);
  if (missing.length === 0) return;
  const names = missing.join(", ");
  if (!which("apt-get"))
    throw new UserError(
      `${purpose} needs ${names} on this machine, and only Debian's apt-get is known here`,
      1,
    );
  if (process.getuid?.() !== 0)
    throw new UserError(`${purpose} needs ${names}: type \`${installCommand(missing)}\``, 1);
  report(`installing ${names}`);
  const install = () =>
    command(
      [
        "apt-get",
        "install",
        "-y",
        "-qq",
        "--no-install-recommends",
        "-o",
        "DPkg::Lock::Timeout=300",
        ...missing,
      ],
      {
        env: { DEBIAN_FRONTEND: "noninteractive" },
      },
    );
  let outcome = await install();
  if (outcome.code !== 0) {
    report("updating the list of packages");
    await command(["apt-get", "update", "-qq"]);
    outcome = await install();
  }
  const still = missingPackages(tools);
  if (still.length > 0)
    throw new UserError(`apt-get could not install ${still.join(", ")}: ${lastLines(outcome.stderr, 3)}`, 1);
}

/** The end of a program's complaint, as one line. */
export const lastLines = (text: string, count: number): string =>
  text
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "")
    .slice(-count)
    .join("; ");
