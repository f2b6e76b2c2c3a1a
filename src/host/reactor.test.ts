import assert from "node:assert/strict";
import test from "node:test";
import { InvariantViolation } from "../base/errors.ts";
import { monotonicClock } from "./clock.ts";
import { drainFd, EventFd, signalFd } from "./eventfd.ts";
import { Reactor } from "./reactor.ts";
import { socketPair, UnixSocket } from "./socket.ts";

function eventFds(t: test.TestContext, count: number): EventFd[] {
  const fds = Array.from({ length: count }, () => EventFd.create());
  t.after(() => fds.forEach((fd) => void fd.close()));
  return fds;
}

test("calls the handlers of the fds that are ready, until they are drained", (t) => {
  const [a, b] = eventFds(t, 2) as [EventFd, EventFd];
  const reactor = new Reactor();
  const calls: string[] = [];
  reactor.watch(a.fd, () => calls.push("a"));
  reactor.watch(b.fd, () => {
    calls.push("b");
    b.drain();
  });
  assert.equal(reactor.run(0), 0);
  b.signal();
  b.signal();
  assert.equal(reactor.run(0), 1);
  assert.equal(reactor.run(0), 0);
  signalFd(a.fd);
  assert.equal(reactor.run(-1), 1);
  assert.equal(reactor.run(-1), 1);
  drainFd(a.fd);
  drainFd(a.fd);
  assert.equal(reactor.run(0), 0);
  assert.deepEqual(calls, ["b", "a", "a"]);
});

test("waits for the timeout, and not longer than for the first event", (t) => {
  const [a] = eventFds(t, 1) as [EventFd];
  const reactor = new Reactor();
  const took = (timeoutMs: number) => {
    const start = monotonicClock.now();
    reactor.run(timeoutMs);
    return (monotonicClock.now() - start) / 1e6;
  };
  assert.ok(took(30) >= 29);
  assert.ok(took(0.5) >= 0.5);
  reactor.watch(a.fd, () => {});
  a.signal();
  assert.ok(took(60_000) < 30_000);
});

test("a handler may unwatch others and itself, and watch new ones", (t) => {
  const [a, b, c] = eventFds(t, 3) as [EventFd, EventFd, EventFd];
  const reactor = new Reactor();
  const calls: string[] = [];
  reactor.watch(a.fd, () => {
    calls.push("a");
    reactor.unwatch(a.fd);
    reactor.unwatch(b.fd);
    reactor.watch(b.fd, () => calls.push("new b"));
    reactor.watch(c.fd, () => calls.push("c"));
  });
  reactor.watch(b.fd, () => calls.push("old b"));
  for (const fd of [a, b, c]) fd.signal();
  assert.equal(reactor.run(0), 1);
  assert.equal(reactor.run(0), 2);
  assert.deepEqual(calls, ["a", "new b", "c"]);
  assert.equal(reactor.size, 2);
});

test("the end of a stream wakes its handler", () => {
  const [ours, theirs] = socketPair().map((fd) => new UnixSocket(fd)) as [UnixSocket, UnixSocket];
  const reactor = new Reactor();
  let calls = 0;
  reactor.watch(ours.fd, () => calls++);
  theirs.close();
  reactor.run(-1);
  assert.equal(calls, 1);
  reactor.unwatch(ours.fd);
  ours.close();
});

test("to watch twice, or to close a watched fd, is our bug", () => {
  const reactor = new Reactor();
  const fd = EventFd.create();
  reactor.watch(fd.fd, () => {});
  assert.throws(() => reactor.watch(fd.fd, () => {}), InvariantViolation);
  fd.close();
  fd.close();
  assert.throws(() => reactor.run(0), InvariantViolation);
});

test("to run it from within a handler is our bug: the outer run would wait for answers that the inner one took", (t) => {
  const [a, b] = eventFds(t, 2) as [EventFd, EventFd];
  const reactor = new Reactor();
  let handled = 0;
  const nested = () => {
    handled++;
    reactor.run(0);
  };
  reactor.watch(a.fd, nested);
  reactor.watch(b.fd, nested);
  a.signal();
  b.signal();
  assert.throws(() => reactor.run(0), InvariantViolation);
  assert.equal(handled, 1);
  assert.throws(() => reactor.run(0), InvariantViolation, "and it can be run again afterwards");
});
