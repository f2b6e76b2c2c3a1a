/** The folder's only timers are in this file. Rejects with what `late` makes when `promise` takes longer than `timeoutMs`. */
export async function within<T>(promise: Promise<T>, timeoutMs: number, late: () => Error): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const expired = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(late()), timeoutMs);
  });
  try {
    return await Promise.race([promise, expired]);
  } finally {
    clearTimeout(timer);
  }
}

/** True when `promise` is settled in time. */
export const settles = (promise: Promise<unknown>, timeoutMs: number): Promise<boolean> =>
  within(
    promise.then(
      () => true,
      () => true,
    ),
    timeoutMs,
    () => new Error("late"),
  ).catch(() => false);

/** Call `act` again and again, until the returned function is called. */
export function every(intervalMs: number, act: () => void): () => void {
  const timer = setInterval(act, intervalMs);
  return () => clearInterval(timer);
}
