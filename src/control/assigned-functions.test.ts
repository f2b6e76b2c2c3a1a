import assert from "node:assert/strict";
import { type TestContext, test } from "node:test";
import { eventually } from "../../test/support/eventually.ts";
import { type Bdf, parseBdf } from "../base/units.ts";
import type { QmpEvent } from "../machine/qemu/qmp.ts";
import { AssignedFunctions } from "./assigned-functions.ts";
import type { AssignedFunction } from "./host-side.ts";

const bdf = (text: string) => parseBdf(text) as Bdf;
const device = (slot: number, id: string) => ({ bus: 0, slot, function: 0, qdev_id: id });
const NET = device(5, "net");
const ANONYMOUS = device(6, "");

/** A QEMU that has what it is told to have, and what the backend is told. */
function qemu(t: TestContext, devices: object[]) {
  const listeners: ((event: QmpEvent) => void)[] = [];
  const set: string[] = [];
  const notes: string[] = [];
  let asked = 0;
  const has = (now: object[]) => void devices.splice(0, devices.length, ...now);
  const qmp = {
    async execute<T>(command: string): Promise<T> {
      assert.equal(command, "query-pci");
      asked++;
      return [{ bus: 0, devices: [...devices] }] as T;
    },
    onEvent(listener: (event: QmpEvent) => void) {
      listeners.push(listener);
      return () => {};
    },
  };
  const functions = new AssignedFunctions(
    qmp,
    {
      assign: async ({ bdf, absent = false }: AssignedFunction) =>
        set.push(`${absent ? "?" : "+"}${bdf >> 3}`),
      unassign: async (bdf) => set.push(`-${bdf >> 3}`),
    },
    [
      { id: "net", bdf: bdf("00:05.0") },
      { id: "", bdf: bdf("00:06.0") },
    ],
    (text) => notes.push(text),
  );
  t.after(() => functions.close());
  const tell = (event: string) => listeners.forEach((listen) => void listen({ event, data: {} }));
  /** What the backend is told next. */
  const next = async (...wanted: string[]) => {
    const came = await eventually(() => set.length >= wanted.length, 2000);
    assert.deepEqual(set.splice(0), wanted, `${came}`);
  };
  return { has, tell, next, notes, asked: () => asked };
}

test("what goes keeps its place until it is back, by its id or else by its place", async (t) => {
  const { has, tell, next, notes, asked } = qemu(t, [NET, ANONYMOUS]);
  has([device(6, "stranger")]);
  tell("DEVICE_DELETED");
  await next("?5", "?6");
  has([NET, device(6, "stranger")]);
  await next("+5");
  has([NET, ANONYMOUS]);
  await next("+6");
  const looks = asked();
  assert.equal(await eventually(() => asked() > looks + 1, 200), false, "nothing is missing any more");
  assert.deepEqual(notes, []);
});

test("what comes back at another place is assigned there and no longer where it was", async (t) => {
  const { has, tell, next, notes } = qemu(t, [NET, ANONYMOUS]);
  has([ANONYMOUS]);
  tell("DEVICE_DELETED");
  await next("?5");
  has([device(5, "stranger"), ANONYMOUS, device(9, "net")]);
  await next("-5", "+9");
  assert.match(notes.join(), /^net, which was 0000:00:05\.0, is 0000:00:09\.0 now/);
});

test("a bridge that firmware has not numbered yet says nothing of where its functions are", async (t) => {
  const behind = (bus: number) => ({
    ...device(2, "port"),
    pci_bridge: { bus: { secondary: bus }, devices: [{ ...device(0, "net"), bus }] },
  });
  const { has, tell, next } = qemu(t, [NET, ANONYMOUS]);
  has([behind(0), ANONYMOUS]);
  tell("RESET");
  await next("?5");
  has([behind(3), ANONYMOUS]);
  await next("-5", `+${(3 << 8) >> 3}`);
});
