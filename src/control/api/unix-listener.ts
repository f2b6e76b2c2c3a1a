import { createHash } from "node:crypto";
import { lstatSync, realpathSync, rmSync } from "node:fs";
import { connect, createServer, type Server } from "node:net";
import { basename, dirname, join } from "node:path";
import { UserError } from "../../base/errors.ts";

/**
 * Listen on a Unix socket that only this user may connect to. A socket that its process has left behind is replaced.
 * Throws UserError for what is not ours to replace.
 */
export async function listenOn(server: Server, path: string): Promise<void> {
  try {
    await bind(server, path);
  } catch (error) {
    if (codeOf(error) !== "EADDRINUSE") throw refused(path, `${(error as Error).message}`);
    const lock = await lockOf(path);
    try {
      await replace(server, path);
    } finally {
      lock.close();
    }
  }
}

/** The caller has the path's lock: without it, what was left behind when it was probed may be live when it is unlinked. */
async function replace(server: Server, path: string): Promise<void> {
  const found = lstatSync(path, { throwIfNoEntry: false });
  if (found && !found.isSocket()) throw refused(path, "a file that is no socket is there");
  const state = await probe(path);
  if (state === "live") throw refused(path, "another process serves there");
  if (state !== "left") throw refused(path, `what serves there cannot be told (${state})`);
  try {
    rmSync(path, { force: true });
    await bind(server, path);
  } catch (again) {
    throw refused(path, (again as Error).message);
  }
}

/**
 * A lock that goes with its process, whatever ends it: a socket in Linux's abstract namespace, which is no file. The name
 * is a digest because it may have 107 bytes, and of the path without links, which is the same for all who mean it.
 */
async function lockOf(path: string): Promise<Server> {
  const lock = createServer((stranger) => stranger.destroy());
  try {
    const place = join(realpathSync(dirname(path)), basename(path));
    await bind(lock, `\0coiommu-api-${createHash("sha256").update(place).digest("hex")}`);
  } catch (error) {
    const taken = codeOf(error) === "EADDRINUSE";
    throw refused(path, taken ? "another process is about to serve there" : (error as Error).message);
  }
  return lock;
}

const refused = (path: string, why: string) => new UserError(`--api ${path}: ${why}`, 1);
const codeOf = (error: unknown) => (error as NodeJS.ErrnoException).code;

async function bind(server: Server, path: string): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once("error", reject).once("listening", resolve);
  // Node binds before listen() returns, so the file never has another mode.
  const mask = process.umask(0o177);
  try {
    server.listen(path);
  } finally {
    process.umask(mask);
  }
  try {
    await promise;
  } finally {
    server.off("error", reject).off("listening", resolve);
  }
}

/** "live", "left" behind by a process that has ended, or why that cannot be told. */
function probe(path: string): Promise<string> {
  return new Promise((resolve) => {
    const socket = connect(path, () => {
      socket.destroy();
      resolve("live");
    });
    socket.on("error", (error) => {
      const code = codeOf(error) ?? error.message;
      resolve(code === "ECONNREFUSED" || code === "ENOENT" ? "left" : code);
    });
  });
}
