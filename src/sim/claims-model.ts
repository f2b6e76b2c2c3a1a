import type { Gfn } from "../base/units.ts";
import { Violation } from "./turn.ts";

interface Claim {
  /** By a PIN request since the frame was pinned. */
  asked: boolean;
  /** Mappings of domains. */
  holds: number;
  /** When the first of these came; later than all accesses that were under way then. */
  readonly since: number;
  /**
   * Whether a device has reached it since. "maybe": an access has begun, and has not got there, or it had begun before the
   * claim; who looks at the page first, device or host, is theirs to decide.
   */
  reached: "no" | "maybe" | "yes";
}

/**
 * What the guest has claimed, and what devices have reached of it: by the requests that were answered with OK, and by the
 * memory that was touched.
 */
export class ClaimsModel {
  readonly #claims = new Map<number, Claim>();
  /**
   * Frames that were pinned unasked, and when. The guest has claimed them when it has used them, which the host finds out at
   * some time since.
   */
  readonly #speculated = new Map<number, number>();
  /** By frame, when an access to it began or ended last. */
  readonly #lastUse = new Map<number, number>();
  /** By device. */
  readonly #accesses = new Map<number, { readonly frames: readonly number[]; readonly began: number }>();
  #time = 0;
  /** Most frames that were claimed and surely not reached. */
  unusedPeak = 0;

  /** For asked() and held(): to be read when the request comes. */
  get now(): number {
    return this.#time;
  }

  asked(gfn: number, since: number): void {
    this.#claim(gfn, since).asked = true;
    this.#speculated.delete(gfn);
  }
  /** Pinned unasked; or so it looks, of a split of what nobody has claimed. */
  speculated(gfn: number): void {
    if (!this.#claims.has(gfn) && !this.#speculated.has(gfn)) this.#speculated.set(gfn, this.#time);
  }
  /** A frame whose page was pinned already is pinned unasked, which the kernel does not hear of. */
  takenOver(gfn: number): void {
    this.#claims.delete(gfn);
    this.#speculated.set(gfn, this.#time);
  }
  held(gfn: number, since: number): void {
    this.#claim(gfn, since).holds++;
  }
  letGo(gfn: number): void {
    const claim = this.#claims.get(gfn);
    if (claim && --claim.holds <= 0 && !claim.asked) this.#claims.delete(gfn);
  }
  /** The frame is pinned anew, or not any more. */
  forget(gfn: Gfn): void {
    this.#claims.delete(gfn);
    this.#speculated.delete(gfn);
  }
  forgetAll(): void {
    this.#claims.clear();
    this.#speculated.clear();
  }

  /** A device begins an access that may go to these frames. */
  begins(device: number, frames: readonly number[]): void {
    this.#accesses.set(device, { frames, began: ++this.#time });
    for (const gfn of frames) {
      this.#lastUse.set(gfn, this.#time);
      const claim = this.#claims.get(gfn);
      if (claim?.reached === "no") claim.reached = "maybe";
    }
  }
  ends(device: number): void {
    const { frames } = this.#accesses.get(device)!;
    this.#accesses.delete(device);
    for (const gfn of frames) this.#lastUse.set(gfn, ++this.#time);
  }
  transferred(device: number, gfn: number): void {
    const claim = this.#claims.get(gfn);
    if (claim) claim.reached = this.#accesses.get(device)!.began > claim.since ? "yes" : "maybe";
  }

  /** What the host says must be so. `pinned`: frames, as checked elsewhere. */
  check(pinned: Iterable<Gfn>, claimed: number, unused: number): void {
    const held = new Set<number>(pinned);
    for (const gfn of this.#claims.keys()) if (!held.has(gfn)) this.#claims.delete(gfn);
    const open = [...this.#speculated.keys()].filter((gfn) => held.has(gfn) && !this.#claims.has(gfn)).length;
    if (claimed < this.#claims.size || claimed > this.#claims.size + open)
      throw new Violation(
        `the guest has claimed ${this.#claims.size} frames, and maybe ${open} more; the host says ${claimed}`,
      );
    const count = (as: Claim["reached"]) =>
      [...this.#claims.values()].filter(({ reached }) => reached === as).length;
    const [no, maybe] = [count("no"), count("maybe")];
    this.unusedPeak = Math.max(this.unusedPeak, no);
    if (unused < no || unused > no + maybe + open)
      throw new Violation(
        `${no} claimed frames were never transferred, and maybe ${maybe + open} more; the host says ${unused}`,
      );
  }

  #claim(gfn: number, since: number): Claim {
    const known = this.#claims.get(gfn);
    if (known) return known;
    const meanwhile =
      (this.#lastUse.get(gfn) ?? -1) > (this.#speculated.get(gfn) ?? since) ||
      [...this.#accesses.values()].some(({ frames }) => frames.includes(gfn));
    const claim: Claim = {
      ...{ asked: false, holds: 0, since: ++this.#time },
      reached: meanwhile ? "maybe" : "no",
    };
    this.#claims.set(gfn, claim);
    return claim;
  }
}
