import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import fs from "node:fs";
import test from "node:test";
import { addressOf, closeFd, libc, setPointer } from "./libc.ts";
import { createMemfd } from "./mapping.ts";
import { FDS_MAX, socketPair, UnixSocket } from "./socket.ts";

const text = (bytes: Uint8Array) => Buffer.from(bytes).toString();
const openFds = () => fs.readdirSync("/proc/self/fd").length;

function pair(t: test.TestContext): [UnixSocket, UnixSocket] {
  const [a, b] = socketPair().map((fd) => new UnixSocket(fd));
  t.after(() => {
    a!.close();
    b!.close();
  });
  return [a!, b!];
}

test("bytes arrive in the sizes that the receiver asks for", (t) => {
  const [a, b] = pair(t);
  a.send(Buffer.from("hello, world"));
  assert.equal(text(b.receive(5).bytes), "hello");
  assert.deepEqual(b.receive(0), { bytes: new Uint8Array(0), fds: [] });
  assert.equal(text(b.receive(7).bytes), ", world");
  const large = Buffer.alloc(100_000, "x");
  a.send(large);
  assert.ok(large.equals(b.receive(large.length).bytes));
});

test("fds arrive with their message, close-on-exec, and refer to the same file", (t) => {
  const [a, b] = pair(t);
  const fd = createMemfd("shared", 4096);
  const before = openFds();
  a.send(Buffer.from("one"), [fd]);
  a.send(Buffer.from("two"), [fd, fd]);
  a.send(Buffer.from("none"));
  const one = b.receive(3);
  assert.equal(text(one.bytes), "one");
  // A receive that spans messages collects the fds of both.
  const rest = b.receive(7);
  assert.equal(text(rest.bytes), "twonone");
  assert.deepEqual([one.fds.length, rest.fds.length], [1, 2]);
  for (const got of [...one.fds, ...rest.fds]) {
    assert.equal(fs.fstatSync(got).ino, fs.fstatSync(fd).ino);
    const flags = /^flags:\s+(\d+)/m.exec(fs.readFileSync(`/proc/self/fdinfo/${got}`, "latin1"))![1]!;
    assert.equal(Number.parseInt(flags, 8) & 0o2000000, 0o2000000);
    closeFd(got);
  }
  assert.equal(openFds(), before);
  closeFd(fd);
});

test("16 fds fit; the peer that sends more is refused and nothing leaks", (t) => {
  const [a, b] = pair(t);
  const fd = createMemfd("many", 4096);
  a.send(Buffer.from("x"), new Array(FDS_MAX).fill(fd));
  const { fds } = b.receive(1);
  assert.equal(fds.length, FDS_MAX);
  fds.forEach(closeFd);
  closeFd(fd);
  assert.throws(() => a.send(Buffer.from("x"), new Array(FDS_MAX + 1).fill(0)), RangeError);

  const before = openFds();
  sendStdin(a.fd, FDS_MAX + 1);
  assert.throws(() => b.receive(1), { code: "ERR_COIOMMU_PROTOCOL" });
  assert.equal(openFds(), before);
});

/** One byte with `count` fds: more than send() would. */
function sendStdin(fd: number, count: number): void {
  const words = (n: number) => new Uint32Array(new ArrayBuffer(4 * n));
  const [control, iovec, header, data] = [words(4 + count + (count % 2)), words(4), words(14), words(1)];
  control.set([16 + 4 * count, 0, 1, 1]); // SOL_SOCKET, SCM_RIGHTS, then fd 0 `count` times
  setPointer(iovec, 0, addressOf(data));
  iovec[2] = 1;
  setPointer(header, 4, addressOf(iovec));
  header[6] = 1;
  setPointer(header, 8, addressOf(control));
  header[10] = control.byteLength;
  // SAFETY: all four buffers live until the end of this function.
  assert.equal(libc.sendmsg(fd, header, 0), 1);
}

test("a message that comes in pieces is awaited", async (t) => {
  const [ours, theirs] = socketPair();
  const socket = new UnixSocket(ours);
  t.after(() => socket.close());
  const script = "printf abc >&3; sleep 0.2; printf defgh >&3";
  const child = spawn("sh", ["-c", script], { stdio: ["ignore", "ignore", "inherit", theirs] });
  closeFd(theirs);
  assert.equal(text(socket.receive(8).bytes), "abcdefgh");
  await new Promise((done) => child.on("exit", done));
  assert.throws(() => socket.receive(1), { code: "ERR_COIOMMU_PEER_GONE" });
});

test("a peer that is gone: PeerGone for both directions, no signal", (t) => {
  const [a, b] = pair(t);
  a.send(Buffer.from("half"));
  a.close();
  assert.throws(() => b.receive(12), { code: "ERR_COIOMMU_PEER_GONE" });
  assert.throws(() => b.send(Buffer.from("x")), { code: "ERR_COIOMMU_PEER_GONE" });
});
