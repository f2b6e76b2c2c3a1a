export const STRATEGIES = ["none", "static", "viommu-strict", "viommu-lazy", "coiommu"] as const;
export type Strategy = (typeof STRATEGIES)[number];

/** The guest's driver remaps every assigned function. */
export const isRemapping = (strategy: Strategy): boolean =>
  strategy === "viommu-strict" || strategy === "viommu-lazy";

/** The guest has a driver of ours, which says what is to be pinned. */
export const hasDriver = (strategy: Strategy): strategy is Exclude<Strategy, "none" | "static"> =>
  strategy === "coiommu" || isRemapping(strategy);
