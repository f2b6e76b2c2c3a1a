/**
 * When may what be unpinned: the guest's life, docs/abi.md section 4, as a pure transition function.
 *
 * - undecided: no driver yet. Firmware's window and what devices touch is pinned, nothing is unpinned.
 * - tracked: the table says what is in use.
 * - frozen: the driver has gone, its devices may still write. Nothing is pinned or unpinned.
 * - static: everything is pinned, as without coIOMMU.
 */
export const LIVES = ["undecided", "tracked", "frozen", "static"] as const;
export type Life = (typeof LIVES)[number];
export type LifeEvent = "pin-on" | "pin-off" | "device-reset" | "machine-reset";

/** `--before-activation`: what is pinned while the guest is undecided. */
export type BeforeActivation = "bios" | "all" | "none";

/** The state at power-on and after a machine reset. */
export const initialLife = (before: BeforeActivation): Life => (before === "all" ? "static" : "undecided");

export function nextLife(life: Life, event: LifeEvent, before: BeforeActivation): Life {
  if (event === "machine-reset") return initialLife(before);
  if (event === "pin-on") return "tracked";
  return life === "tracked" ? "frozen" : life;
}
