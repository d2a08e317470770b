package gemma.edge

import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test

class SamplerTest {
    private val logits = floatArrayOf(0f, 3f, -1f, 3f, 2.5f)

    private fun params(node: Node) = SamplingParams(
        temperature = node["temperature"].double,
        topK = if ("top_k" in node) node["top_k"].long.toInt() else 0,
        topP = if ("top_p" in node) node["top_p"].double else 1.0,
        minP = if ("min_p" in node) node["min_p"].double else 0.0,
        repetitionPenalty = if ("repetition_penalty" in node) node["repetition_penalty"].double else 1.0,
    )

    @Test
    fun filters_leave_what_pythons_leave() {
        for (row in Fixtures.models.first().filters) {
            val sampler = Sampler(params(row["params"]))
            Fixtures.ints(row["seen"]).forEach(sampler::observe)
            val actual = sampler.distribution(row["logits"].list.map { it.double.toFloat() }.toFloatArray())
            val name = row["params"].value.toString()
            // numpy and Java round exp differently in the last digit
            val expected = Fixtures.ints(row["ids"]).zip(row["probabilities"].list.map { it.double }).toMap()
            assertEquals(name, expected.keys, actual.ids.toSet())
            for (i in actual.ids.indices) assertEquals(name, expected.getValue(actual.ids[i]), actual.probabilities[i], 1e-6)
        }
    }

    @Test
    fun greedy_takes_the_first_of_the_largest() {
        assertEquals(1, Sampler(SamplingParams()).sample(logits))
    }

    @Test
    fun greedy_heeds_the_repetition_penalty() {
        val sampler = Sampler(SamplingParams(repetitionPenalty = 1.5))
        val drawn = List(3) { sampler.sample(logits).also(sampler::observe) }
        assertEquals(listOf(1, 3, 4), drawn)
        assertArrayEquals("the logits are left alone", floatArrayOf(0f, 3f, -1f, 3f, 2.5f), logits, 0f)
    }

    @Test
    fun draws_are_as_frequent_as_probable_and_repeatable() {
        val params = SamplingParams(temperature = 1.0, topK = 3, seed = 7)
        val sampler = Sampler(params)
        val drawn = List(20_000) { sampler.sample(logits) }
        val expected = Sampler(params).distribution(logits)
        assertEquals(setOf(1, 3, 4), drawn.toSet())
        for (i in expected.ids.indices) {
            // the tolerance is 4 standard deviations of a frequency
            assertEquals(expected.probabilities[i], drawn.count { it == expected.ids[i] } / 20_000.0, 4 * 0.5 / Math.sqrt(20_000.0))
        }
        val again = Sampler(params)
        assertEquals(drawn, List(20_000) { again.sample(logits) })
    }

    @Test
    fun logits_that_are_no_numbers_are_refused() {
        for (bad in listOf(Float.NaN, Float.POSITIVE_INFINITY)) {
            assertRefuses<BundleException>("damaged") { Sampler(SamplingParams()).sample(floatArrayOf(1f, bad, 2f)) }
        }
    }

    @Test
    fun numbers_that_no_filter_can_take_are_refused_by_name() {
        assertRefuses<InputException>("temperature -1.0", "0") { SamplingParams(temperature = -1.0) }
        assertRefuses<InputException>("temperature NaN") { SamplingParams(temperature = Double.NaN) }
        assertRefuses<InputException>("topK -1") { SamplingParams(topK = -1) }
        assertRefuses<InputException>("topP 0.0") { SamplingParams(topP = 0.0) }
        assertRefuses<InputException>("topP NaN") { SamplingParams(topP = Double.NaN) }
        assertRefuses<InputException>("minP 1.5") { SamplingParams(minP = 1.5) }
        assertRefuses<InputException>("repetitionPenalty 0.0") { SamplingParams(repetitionPenalty = 0.0) }
        assertTrue(SamplingParams(temperature = 1e-6).temperature > 0)
    }
}
