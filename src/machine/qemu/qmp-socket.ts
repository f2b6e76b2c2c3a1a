import net from "node:net";
import { CoiommuError, HostError, UserError } from "../../base/errors.ts";
import { connectSocket, UnixSocket } from "../../host/socket.ts";
import { within } from "./deadline.ts";
import { Qmp } from "./qmp.ts";

const GREETING_MS_MAX = 5_000;

/** The control connection of a QEMU that somebody else has started with `-qmp unix:PATH,server=on,wait=off`. */
export async function connectQmp(path: string): Promise<{ qmp: Qmp; version: string }> {
  const qmp = qmpOn(connected(path));
  try {
    return { qmp, version: await within(qmp.ready, GREETING_MS_MAX, () => silent(path)) };
  } catch (error) {
    qmp.close();
    if (!(error instanceof CoiommuError) || error.message === silent(path).message) throw error;
    throw new UserError(`${path} is not a QMP socket: it closed the connection without QMP's greeting`, 1);
  }
}

/** The control connection at the other end of a socket, whose fd it owns. */
export function qmpOn(fd: number): Qmp {
  const stream = new net.Socket({ fd });
  // Sends alone, and only while the stream, which owns the fd, is open.
  const socket = new UnixSocket(fd);
  return new Qmp(stream, (bytes, fds) => socket.send(bytes, fds));
}

const silent = (path: string): UserError =>
  new UserError(
    `${path} says nothing as QEMU would: it is not a QMP socket, or another client is connected to it ` +
      "(QEMU serves one at a time; give it a second -qmp)",
    1,
  );

const REASONS: Readonly<Record<string, string>> = {
  ENOENT: "does not exist: start QEMU with -qmp unix:PATH,server=on,wait=off",
  EACCES: "may not be used by this user: be the user that QEMU runs as, or root",
  EPERM: "may not be used by this user: be the user that QEMU runs as, or root",
  ECONNREFUSED: "is no socket that anybody listens on: is QEMU running?",
  EAGAIN: "is busy: other clients wait for it already (QEMU serves one at a time; give it a second -qmp)",
  EPROTOTYPE: "is not a stream socket, as QMP's is",
  ENAMETOOLONG: "is too long for a socket's path",
};

function connected(path: string): number {
  try {
    return connectSocket(path);
  } catch (error) {
    const reason = error instanceof HostError ? REASONS[error.errno] : undefined;
    if (reason === undefined) throw error;
    throw new UserError(`${path} ${reason}`, 1);
  }
}
