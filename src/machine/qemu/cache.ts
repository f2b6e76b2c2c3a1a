import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
} from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";

const KEPT_PER_KIND = 3;
const TEMPORARY = ".new-";

export const cacheDirectory = (): string => {
  const base = process.env.XDG_CACHE_HOME;
  return join(base ? base : join(homedir(), ".cache"), "coiommu");
};

export const digest = (...parts: (string | Uint8Array)[]): string => {
  const hash = createHash("sha256");
  // Length-prefixed, so that ["ab", "c"] and ["a", "bc"] differ.
  for (const part of parts) hash.update(`${part.length}:`).update(part);
  return hash.digest("hex").slice(0, 16);
};

export const cachePath = (kind: string, key: string): string => join(cacheDirectory(), kind, key);

/**
 * The folder `kind/key` of the cache, filled by `build` if it is not there. It appears by rename, so it is
 * complete or absent; when two processes build the same one, the first to finish wins and both use it.
 */
export async function cached(
  kind: string,
  key: string,
  build: (folder: string) => Promise<void>,
): Promise<string> {
  const path = cachePath(kind, key);
  if (existsSync(path)) {
    const now = new Date();
    utimesSync(path, now, now);
    return path;
  }
  const parent = join(cacheDirectory(), kind);
  mkdirSync(parent, { recursive: true });
  const temporary = mkdtempSync(join(parent, `${TEMPORARY}${process.pid}-`));
  const removeOnExit = () => rmSync(temporary, { recursive: true, force: true });
  process.once("exit", removeOnExit);
  try {
    await build(temporary);
    try {
      renameSync(temporary, path);
    } catch (error) {
      if (!existsSync(path)) throw error;
    }
  } finally {
    removeOnExit();
    process.off("exit", removeOnExit);
  }
  prune(parent);
  return path;
}

/** Keep the entries used last; drop what builders that were killed left behind. */
function prune(parent: string): void {
  const names = readdirSync(parent);
  const finished = names
    .filter((name) => !name.startsWith(TEMPORARY))
    .map((name) => ({ name, used: statSync(join(parent, name), { throwIfNoEntry: false })?.mtimeMs ?? 0 }))
    .sort((a, b) => b.used - a.used);
  const abandoned = names.filter(
    (name) => name.startsWith(TEMPORARY) && !isAlive(Number(name.split("-")[1])),
  );
  for (const name of [...finished.slice(KEPT_PER_KIND).map((entry) => entry.name), ...abandoned])
    rmSync(join(parent, name), { recursive: true, force: true });
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

const HOLD_LOCK = `exec 9>"$0"; flock -n 9 || { echo waiting; flock 9; }; echo held; exec cat`;

/**
 * Run `body` while holding the cache's lock, so that two runs neither download the same packages twice nor meet
 * in apt. A child holds it, and ends with its standard input: however we end, the lock is free.
 */
export async function withCacheLock<T>(waiting: () => void, body: () => Promise<T>): Promise<T> {
  mkdirSync(cacheDirectory(), { recursive: true });
  const holder = spawn("sh", ["-c", HOLD_LOCK, join(cacheDirectory(), "lock")], {
    stdio: ["pipe", "pipe", "ignore"],
    detached: true, // a Ctrl-C is for us; the child then sees its input end
  });
  const ended = new Promise<void>((resolve) => holder.once("close", () => resolve()));
  try {
    await new Promise<void>((resolve) => {
      holder.stdout.setEncoding("utf8").on("data", (text: string) => {
        if (text.includes("waiting")) waiting();
        if (text.includes("held")) resolve();
      });
      holder.once("close", () => resolve()); // no flock(1): renames still keep the cache whole
    });
    return await body();
  } finally {
    holder.stdin.end();
    await ended;
  }
}
