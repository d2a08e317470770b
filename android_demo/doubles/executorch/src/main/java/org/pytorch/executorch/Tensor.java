package org.pytorch.executorch;

/** ONLY TO COMPILE AGAINST, see Module. */
public abstract class Tensor {
  Tensor() {}

  public static Tensor fromBlob(long[] data, long[] shape) {
    throw new IllegalStateException();
  }

  public long[] shape() {
    return new long[0];
  }

  public float[] getDataAsFloatArray() {
    return new float[0];
  }
}
