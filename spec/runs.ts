/** What is checked: configurations of coiommu.pml that must hold, and twins that must not. */

/** Macros for coiommu.pml; its head explains them. */
export type Defines = Readonly<Record<string, number | true>>;

/** What the model asserts, by the beginning of the expression as spin prints it, without spaces. */
export const ASSERTIONS = {
  "a device was refused a frame that is mapped": "(allowed&",
  "a device accessed a page that is not pinned": "((held&todo)==todo)",
  "a device accessed a mapped page that is not pinned": "((held&job[who])==job[who])",
  "a page was released while it was mapped": "!(((job[0]|job[1])&",
  "an answer of OK came before P": "(unit[",
  "an answer of OK came before the pin": "((held&asked)==asked)",
  "a refused request has pinned something": "((held&~(before))==0)",
  "the quota was passed": "(((held&1)+(held>>1))<=",
  "ledger, IOMMU and kernel disagree": "((ledger==held)&&(allowed==held))",
  "a count was lost": "(seen&15)",
  "a count has overflowed": "((seen&15)<15)",
} as const;
export type Property = keyof typeof ASSERTIONS;

/** What must happen at last, under weak fairness; the names of the model's LTL formulae. */
export type Liveness = "answered_at_last" | "unpinned_at_last";

export interface Run {
  readonly defines: Defines;
  /** Without it: the assertions, and that nothing gets stuck. */
  readonly liveness?: Liveness;
}

const map: Defines = { QUOTA: 2, CPUS: 2, MAPPINGS: 3 };
const quota: Defines = { QUOTA: 1, CPUS: 2, MAPPINGS: 3 };
const life: Defines = { QUOTA: 2, CPUS: 2, MAPPINGS: 1, LIFE: true };
const hostile: Defines = { QUOTA: 1, HOSTILE: true };
const live: Defines = { QUOTA: 2, CPUS: 2, MAPPINGS: 2, LIVE: true, REFUSALS: 1 };
const tight: Defines = { ...live, QUOTA: 1 };

export const RUNS: Readonly<Record<string, Run>> = {
  "map, unmap, pin and unpin": { defines: map },
  "a quota of one frame, with unpins inside requests": { defines: quota },
  "the driver goes and comes, two CPUs share a frame": { defines: life },
  "the driver goes and comes, a CPU maps two frames": { defines: { ...life, CPUS: 1, MAPPINGS: 3 } },
  "a hostile guest and a device that goes astray": { defines: hostile },
  "every request is answered": { defines: live, liveness: "answered_at_last" },
  "every request is answered, with a quota of one frame": { defines: tight, liveness: "answered_at_last" },
  "what is idle is unpinned": { defines: live, liveness: "unpinned_at_last" },
  "what is idle is unpinned, with a quota of one frame": { defines: tight, liveness: "unpinned_at_last" },
};

export interface Twin {
  /** The macro, without TWIN_. */
  readonly macro: string;
  readonly run: Run;
  /** What the checker must find; of a liveness run it is a cycle. */
  readonly finds: Property | "acceptance cycle";
}

const caught = (macro: string, defines: Defines, finds: Property): Twin => ({
  macro,
  run: { defines },
  finds,
});
const starves = (macro: string, liveness: Liveness): Twin => ({
  macro,
  run: { defines: live, liveness },
  finds: "acceptance cycle",
});
const REFUSED = "a device was refused a frame that is mapped";

export const TWINS: Readonly<Record<string, Twin>> = {
  "a map that tests P before it counts": caught("TEST_BEFORE_COUNT", map, REFUSED),
  "an unmap of load and store": caught("TORN_UNMAP", map, "a count was lost"),
  "an unpin of load and store": caught("TORN_CLAIM", map, "a count was lost"),
  "an unpin that ignores COUNT": caught(
    "IGNORE_COUNT",
    { ...map, NO_DMA: true },
    "a page was released while it was mapped",
  ),
  "an unpin that ignores COUNT, while devices work": caught("IGNORE_COUNT", map, REFUSED),
  "an unpin that clears P after the release": caught("CLEAR_AFTER_RELEASE", map, REFUSED),
  "an unpin that does not wait for DMA windows": caught(
    "NO_QUIESCE",
    hostile,
    "a device accessed a page that is not pinned",
  ),
  "an unpin that is taken back without the IOMMU": caught(
    "KEEP_REVOKED",
    hostile,
    "ledger, IOMMU and kernel disagree",
  ),
  "a pin that sets P first": caught("SET_BEFORE_PIN", map, REFUSED),
  "a pin that answers before it sets P": caught("ANSWER_FIRST", map, "an answer of OK came before P"),
  "a pin that keeps a part of what it was refused": caught(
    "KEEP_PART",
    map,
    "a refused request has pinned something",
  ),
  "a pin that believes the guest's P": caught("BELIEVE_P", hostile, "an answer of OK came before the pin"),
  "a pin that ignores the quota": caught("NO_QUOTA", quota, "the quota was passed"),
  "a driver that keeps P when it has gone": caught("KEEP_P", life, REFUSED),
  "a driver that comes back and does not ask for what is mapped": caught("NO_REASK", life, REFUSED),
  "an unpin of an earlier activation's frames that ignores COUNT": caught(
    "FOREIGN_IGNORES_COUNT",
    life,
    REFUSED,
  ),
  "a refusal that is not told": starves("LOSE_REFUSAL", "answered_at_last"),
  "an unpin that is taken back without P": starves("KEEP_P_CLEAR", "unpinned_at_last"),
  "a pass that never clears A": starves("NO_AGEING", "unpinned_at_last"),
};
