import { mkdirSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { UserError } from "../../base/errors.ts";
import { cacheDirectory, digest } from "./cache.ts";
import { command } from "./command.ts";
import { lastLines, type Report } from "./packages.ts";

const SYSTEM_LISTS = "/var/lib/apt/lists";

/**
 * Debian's packages without installing any: look up, download, unpack. The machine's own lists are used where it
 * has some. Otherwise root fetches them, and anybody else fetches the same lists (from the sources that this
 * machine is configured with) into a private apt state in the cache.
 */
export class Apt {
  readonly #report: Report;
  #options: string[] = [];
  #updated = false;

  constructor(report: Report) {
    this.#report = report;
  }

  static hasLists(): boolean {
    return packageLists().length > 0;
  }

  /** Changes when the lists of packages do. */
  static stamp(): string {
    const folder = privateLists() ?? SYSTEM_LISTS;
    const files = filesIn(folder).filter((name) => name.includes("_Packages") || name.includes("Release"));
    return digest(
      ...files.sort().map((name) => {
        const { size, mtimeMs } = statSync(join(folder, name));
        return `${name} ${size} ${mtimeMs}`;
      }),
    );
  }

  /** Make sure that `name` can be looked up. */
  async ensureLists(name: string): Promise<void> {
    if (privateLists()) this.#options = privateState();
    if ((await this.versions([name])).size > 0) return;
    await this.update();
    if ((await this.versions([name])).size === 0)
      throw new UserError(
        `Debian's package ${name} is in none of this machine's apt sources: add Debian's main`,
        1,
      );
  }

  /** Fetch the lists, once per run. False: that had been done already. */
  async update(): Promise<boolean> {
    if (this.#updated) return false;
    this.#updated = true;
    this.#report("updating the list of packages");
    if (process.getuid?.() !== 0) this.#options = privateState();
    const outcome = await command(["apt-get", "update", "-qq", ...this.#options]);
    if (outcome.code !== 0)
      throw new UserError(
        `apt-get update failed: ${lastLines(outcome.stderr, 2)}; run it as root and try again`,
        1,
      );
    return true;
  }

  /** Candidate versions; a package that does not exist is not in the map. */
  async versions(names: readonly string[]): Promise<Map<string, string>> {
    const { stdout } = await command(["apt-cache", "policy", ...this.#options, ...names]);
    const found = new Map<string, string>();
    for (const [, name, version] of stdout.matchAll(/^(\S+):\n\s+Installed: .*\n\s+Candidate: (\S+)$/gm))
      if (version !== "(none)") found.set(name!, version!);
    return found;
  }

  /** The packages that `name` depends on directly, the first of each set of alternatives. */
  async depends(name: string): Promise<string[]> {
    const { stdout } = await command(["apt-cache", "depends", ...this.#options, name]);
    const lines = stdout.split("\n").slice(1);
    const isFirst = (i: number) => !lines[i - 1]?.startsWith(" |");
    return lines.flatMap((line, i) => {
      const match = /^ [ |]Depends: ([^<>\s]+)$/.exec(line);
      return match && isFirst(i) ? [match[1]!] : [];
    });
  }

  /** Download exactly these packages and unpack them into `folder`. */
  async unpack(names: readonly string[], folder: string): Promise<void> {
    const packages = join(folder, ".packages");
    mkdirSync(packages, { recursive: true });
    const download = await command(["apt-get", "download", "-qq", ...this.#options, ...names], {
      cwd: packages,
    });
    if (download.code !== 0)
      throw new DownloadFailed(
        `apt-get could not download ${names.join(" ")}: ${lastLines(download.stderr, 2)}`,
        1,
      );
    for (const file of readdirSync(packages)) {
      const unpacked = await command(["dpkg", "-x", join(packages, file), folder]);
      if (unpacked.code !== 0)
        throw new UserError(`dpkg could not unpack ${file}: ${lastLines(unpacked.stderr, 2)}`, 1);
    }
    await command(["rm", "-rf", packages]);
  }
}

/** Often a list older than what the mirror serves: worth an update and a second try. */
export class DownloadFailed extends UserError {}

const privateRoot = () => join(cacheDirectory(), "apt");
const PRIVATE_LISTS = "state/lists";

function packageLists(): string[] {
  const folder = privateLists() ?? SYSTEM_LISTS;
  const names = filesIn(folder).filter((name) => name.includes("_Packages"));
  return names.map((name) => join(folder, name));
}

/** None where there is no such folder: not every machine has apt. */
function filesIn(folder: string): string[] {
  return statSync(folder, { throwIfNoEntry: false }) ? readdirSync(folder) : [];
}

function privateLists(): string | undefined {
  const folder = join(privateRoot(), PRIVATE_LISTS);
  return statSync(folder, { throwIfNoEntry: false }) ? folder : undefined;
}

function privateState(): string[] {
  const root = privateRoot();
  mkdirSync(join(root, PRIVATE_LISTS, "partial"), { recursive: true });
  mkdirSync(join(root, "cache/archives/partial"), { recursive: true });
  const settings = [
    `Dir::State=${root}/state`,
    `Dir::State::status=/var/lib/dpkg/status`,
    `Dir::Cache=${root}/cache`,
  ];
  return settings.flatMap((setting) => ["-o", setting]);
}
