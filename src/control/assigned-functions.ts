import { type Bdf, formatBdf } from "../base/units.ts";
import { every } from "../machine/qemu/deadline.ts";
import { pciFunctions, type QemuFunction } from "../machine/qemu/hotplug.ts";
import type { Qmp } from "../machine/qemu/qmp.ts";
import type { AssignedFunction } from "./host-side.ts";

/** QEMU does not tell of a device that is plugged: it is looked for, while one is missing. */
const LOOK_MS = 20;

/** Sets one of the assigned functions, as the backend's commands `assign` and `unassign` do. */
export interface AssignedSet {
  assign(assigned: AssignedFunction): Promise<unknown>;
  unassign(bdf: Bdf): Promise<unknown>;
}

interface Followed {
  readonly id: string;
  bdf: Bdf;
  absent: boolean;
}

/**
 * Functions that QEMU has of its own, and that may go and come back, also at another place. One is known by its id, or by
 * its place if it has none. While it is away its place stays assigned, so that it is tracked from its first driver on when
 * it comes back there. Elsewhere it is assigned when it is seen: a driver that was quicker has to be bound again.
 */
export class AssignedFunctions {
  readonly #qmp: Pick<Qmp, "execute" | "onEvent">;
  readonly #set: AssignedSet;
  readonly #note: (text: string) => void;
  readonly #followed: readonly Followed[];
  #looking: Promise<void> | undefined;
  #again: (() => void) | undefined;

  /** `functions`: those of QEMU that are assigned now. */
  constructor(
    qmp: Pick<Qmp, "execute" | "onEvent">,
    set: AssignedSet,
    functions: readonly QemuFunction[],
    note: (text: string) => void = () => {},
  ) {
    this.#qmp = qmp;
    this.#set = set;
    this.#note = note;
    this.#followed = functions.map(({ id, bdf }) => ({ id, bdf, absent: false }));
    if (functions.length === 0) return;
    qmp.onEvent(({ event }) => {
      // Firmware numbers buses anew.
      if (event === "DEVICE_DELETED" || event === "RESET") this.#look();
    });
  }

  /** Where they are, of those that QEMU has now. */
  get present(): Bdf[] {
    return this.#followed.filter(({ absent }) => !absent).map(({ bdf }) => bdf);
  }

  close(): void {
    this.#again?.();
    this.#again = undefined;
  }

  #look(): void {
    this.#again ??= every(LOOK_MS, () => {
      // A QEMU that does not answer any more is told by the end of its connection.
      this.#looking ??= this.#compare()
        .catch(() => {})
        .finally(() => {
          this.#looking = undefined;
        });
    });
  }

  async #compare(): Promise<void> {
    const there = await pciFunctions(this.#qmp);
    for (const followed of this.#followed) {
      const { id, bdf } = followed;
      const now = there.find((f) => f.id === id && (id !== "" || f.bdf === bdf));
      if (!now && !followed.absent) await this.#set.assign({ bdf, absent: true });
      if (now && now.bdf !== bdf) await this.#move(followed, now.bdf);
      else if (now && followed.absent) await this.#set.assign({ bdf });
      followed.absent = !now;
    }
    if (!this.#followed.some(({ absent }) => absent)) this.close();
  }

  async #move(followed: Followed, to: Bdf): Promise<void> {
    const { id, bdf } = followed;
    // Another one may have come where it was.
    if (!this.#followed.some((f) => f !== followed && f.bdf === bdf)) await this.#set.unassign(bdf);
    await this.#set.assign({ bdf: to });
    followed.bdf = to;
    this.#note(
      `${id}, which was ${formatBdf(bdf)}, is ${formatBdf(to)} now: if its driver was quicker than we, bind it again`,
    );
  }
}
